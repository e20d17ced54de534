"""The hosts that tests build: each has its own name and network, and a cut cable isolates it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster.network import Network, network

pytestmark = pytest.mark.cluster

LISTEN = "import socket; s = socket.create_server(('', 7000)); print('up', flush=True); s.accept()"
CALL = "import socket; print(socket.gethostname()); socket.create_connection(('b', 7000), {})"


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Network]:
    with network(["a", "b"], tmp_path) as built:
        yield built


def call(net: Network, within_s: float) -> tuple[str, bool]:
    """Connect from host a to host b; return the caller's name and whether the connection succeeded."""
    command = net.hosts["a"].enter(sys.executable, "-c", CALL.format(within_s))
    ran = subprocess.run(command, capture_output=True, text=True)
    assert not ran.returncode or "TimeoutError" in ran.stderr, ran.stderr
    return ran.stdout.strip(), not ran.returncode


def test_a_host_is_unreachable_while_its_cable_is_cut(net: Network) -> None:
    command = net.hosts["b"].enter(sys.executable, "-c", LISTEN)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as listener:
        try:
            assert listener.stdout is not None
            listener.stdout.readline()
            net.cut("b")
            assert call(net, within_s=0.5) == ("a", False)
            net.mend("b")
            assert call(net, within_s=60.0) == ("a", True)  # the switch may take a second to notice
        finally:
            listener.kill()
