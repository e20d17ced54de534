"""Hosts on one machine for tests, each with its own network, its own name, and one cable to a switch.

    with network(["node1", "node2"]) as net:
        subprocess.run(net.hosts["node1"].enter("ping", "-c1", "node2"))
        net.cut("node1")

A namespace lives as long as the process that holds it, so nothing is left when this process is killed.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.needs import needs

SUBNET = "10.77.0"
HOLD = """
mount --bind "$1" /etc/hosts
hostname "$2"
ip link set lo up
echo ready
exec sleep infinity
"""


@dataclass(frozen=True)
class Host:
    """A network, a host name and a table of names, held by a process."""

    name: str
    address: str
    pid: int

    def enter(self, *command: str) -> list[str]:
        """Return the command that runs a command on this host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--wd=.", *command]


@dataclass(frozen=True)
class Network:
    """Hosts by name, and the switch."""

    hosts: Mapping[str, Host]
    switch: Host

    def cut(self, host: str) -> None:
        """Pull the cable of a host: packets are lost without notice."""
        _ip(self.switch, f"link set dev {host} down")

    def mend(self, host: str) -> None:
        _ip(self.switch, f"link set dev {host} up")


@contextmanager
def network(names: Sequence[str], folder: Path) -> Iterator[Network]:
    """Build the network, which takes a fraction of a second; `folder` stores the table of names.

    Skips the test where a part is missing, and fails it where DIT_SCALE_REQUIRE_ALL is 1.
    """
    needs(
        shutil.which("ip", path=f"{os.defpath}:/usr/sbin:/sbin") is not None, "ip: apt-get install iproute2"
    )
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True)
    needs(tried.returncode == 0, "permission to create network namespaces: run as root")
    addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, start=1)}
    table = folder / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    table.write_text("\n".join(lines) + "\n")
    with ExitStack() as stack:
        switch = _host(stack, table, "switch", "")
        _ip(switch, "link add name bridge type bridge")
        _ip(switch, "link set dev bridge up")
        hosts = {name: _host(stack, table, name, address) for name, address in addresses.items()}
        for host in hosts.values():
            _connect(switch, host)
        yield Network(hosts, switch)


def _host(stack: ExitStack, table: Path, name: str, address: str) -> Host:
    holder = stack.enter_context(
        subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--mount"]
            + ["sh", "-ec", HOLD, "sh", str(table), name],
            stdout=subprocess.PIPE,
        )
    )
    stack.callback(holder.kill)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n", f"no namespace for {name}"
    return Host(name, address, holder.pid)


def _connect(switch: Host, host: Host) -> None:
    _ip(switch, f"link add name {host.name} type veth peer name eth0 netns {host.pid}")
    _ip(switch, f"link set dev {host.name} master bridge up")
    _ip(host, f"address add {host.address}/24 dev eth0")
    _ip(host, "link set dev eth0 up")


def _ip(host: Host, command: str) -> None:
    subprocess.run(host.enter("ip", *command.split()), check=True)
