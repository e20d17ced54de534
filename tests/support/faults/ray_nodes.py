"""A real Ray cluster on loopback for tests: a head and further nodes, each with its own processes.

Every process of a node carries the node's mark in its environment, so that a test can find and kill it.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dit_scale_pipeline import ray_start
from tests.support.faults.ports import free_port
from tests.support.speed import scaled

RAY_START = (sys.executable, "-m", "dit_scale_pipeline.ray_start")
MARK = "DIT_SCALE_TEST_NODE"
"""Variable in the environment of all processes of a node."""
HEAD, SECOND = 0, 1
START_S = scaled(400.0)
END_S = scaled(120.0)
NOTICE_SOON = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}
"""A killed node is detected within about 2 s; by default Ray takes 15 s."""


class RayNodes:
    """The nodes of one cluster, by number; the first is the head."""

    def __init__(self, environment: Mapping[str, str], cpus: float) -> None:
        self._environment = {**environment, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        self._environment |= NOTICE_SOON
        self._cpus = cpus
        self._mark = uuid.uuid4().hex
        # Ray's sockets are in its folder, and a socket's path must be short.
        self._folder = Path("/tmp") / f"ray-{self._mark[:8]}"
        self._port = 0
        self._launchers: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def driver_environment(self) -> dict[str, str]:
        """Environment variables that lead a driver to this cluster."""
        return self._environment | {"RAY_ADDRESS": f"127.0.0.1:{self._port}"}

    def start(self, node: int) -> None:
        """Start a node that is not running, and wait until it is up."""
        command = [*RAY_START, "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={self._cpus:g}"]
        command += ["--object-store-memory=200000000"]
        # Other ports have fixed default numbers, where another Ray may listen.
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        for name in ("object-manager", "node-manager", "dashboard-agent-listen", "metrics-export"):
            command.append(f"--{name}-port={free_port()}")
        if node == HEAD:
            self._port = free_port()
            command += ["--head", f"--port={self._port}", f"--temp-dir={self._folder}"]
            command += ["--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
        else:
            command += [f"--address=127.0.0.1:{self._port}"]
        self._folder.mkdir(exist_ok=True)
        for left in reversed(range(ray_start.TRIES)):
            if self._has_started(node, command):
                return
            assert left, self._log(node).read_text()

    def _log(self, node: int) -> Path:
        return self._folder / f"node{node}.log"

    def _has_started(self, node: int, command: Sequence[str]) -> bool:
        """Start a node and wait until it is up or has exited: Ray gives up a slow start after 15 s."""
        with self._log(node).open("wb") as output:
            self._launchers[node] = subprocess.Popen(
                command,
                env=self._environment | {MARK: f"{self._mark}/{node}"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        end_s = time.monotonic() + START_S
        while "Ray runtime started" not in self._log(node).read_text():
            if self._launchers[node].poll() is not None:
                self.kill(node)
                return False
            assert time.monotonic() < end_s, self._log(node).read_text()
            time.sleep(0.1)
        return True

    def processes(self, node: int | None = None, name: str = "") -> dict[int, str]:
        """Return process id and command line of running processes whose command contains this text."""
        mark = f"{MARK}={self._mark}/" + ("" if node is None else f"{node}\0")
        return {pid: command for pid, command in marked_processes(mark).items() if name in command}

    def kill(self, node: int) -> None:
        """Kill all processes of a node together, like a power loss."""
        while found := self.processes(node):
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if launcher := self._launchers.pop(node, None):
                launcher.wait(END_S)

    def is_alive(self, node: int) -> bool:
        return node in self._launchers

    def close(self) -> None:
        for node in sorted(self._launchers, reverse=True):
            self.kill(node)
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def ray_nodes(environment: Mapping[str, str], cpus: float, count: int = 2) -> Iterator[RayNodes]:
    """A cluster of several nodes with the given CPUs each; it stops at the end of the block."""
    nodes = RayNodes(environment, cpus)
    try:
        for node in range(count):
            nodes.start(node)
        yield nodes
    finally:
        nodes.close()


def marked_processes(mark: str) -> dict[int, str]:
    """Return process id and command line of running processes with this text in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has exited, or belongs to another user
            if mark.encode() in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:  # otherwise it is a zombie
                    found[int(folder.name)] = command
    return found
