"""Nodes of a run for tests: real `dit-scale launch` processes with real launchers and ranks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dit_scale.config import TrainConfig, dump
from dit_scale.elastic.board import Board
from dit_scale.elastic.node.processes import is_alive
from dit_scale.elastic.node.rank import SUPERVISOR_VARIABLE
from dit_scale.elastic.run_progress import committed_step
from dit_scale.journal import read_journal
from dit_scale.train.run_folder import root_of
from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.record import last_step
from tests.support.speed import scaled

TIMEOUT_S = scaled(400.0)
LEASE_S = scaled(30.0)
"""Longer than a busy machine delays a supervisor. Tests that kill supervisors use a shorter lease."""


class Node:
    """One start of the supervisor of a node; a restart under the same name is another Node."""

    def __init__(
        self,
        config: TrainConfig,
        name: str,
        *arguments: str,
        slots: int = 1,
        fault: str = "",
        under: Sequence[str] = (),
    ) -> None:
        """`fault`: see tests.support.nodes.faulty; `under`: a command that executes the supervisor."""
        self.config, self.name = config, name
        folder = Path(config.run).parent
        path = folder / f"{name}.yaml"
        path.write_text(dump(config))
        self.log = folder / f"{name}.log"
        module = "tests.support.nodes.faulty" if fault else "dit_scale.cli"
        command = [*under, sys.executable, "-m", module, "launch", str(path), "--node", name]
        command += ["--address", "127.0.0.1", "--slots", str(slots), "--lease-s", str(LEASE_S), *arguments]
        environment = os.environ | {"FAULT": fault}
        environment.pop("DS_ACCELERATOR", None)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def processes(self) -> dict[int, dict[str, str]]:
        """Return the environments of the launcher and the ranks, by process id."""
        found = {}
        mark = f"{SUPERVISOR_VARIABLE}={self.process.pid}"
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has exited
                continue
            if mark in variables and is_alive(int(folder.name)):
                found[int(folder.name)] = dict(text.split("=", 1) for text in variables if "=" in text)
        return found

    def ranks(self) -> dict[int, int]:
        """Return process ids by rank, without the writers, which are children of ranks."""
        found = self.processes().items()
        return {int(env["RANK"]): pid for pid, env in found if "RANK" in env and _runs(pid, "train")}

    def launcher(self) -> int:
        """Return the process id of the launcher."""
        (found,) = (pid for pid in self.processes() if _runs(pid, "deepspeed.launcher.launch"))
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of this name in the journal of the node, over all starts of its supervisor."""
        path = Path(self.config.run) / "supervisors" / f"{self.name}.jsonl"
        return [event for event in read_journal(path) if event["event"] == name]

    def endings(self) -> list[tuple[str, str]]:
        """Return reason and node of every round that ended, from the journal of the node."""
        return [(event["reason"], event["failed_node"]) for event in self.events("round_ended")]

    def says(self, text: str) -> bool:
        """Whether the log of the node contains a text."""
        return text in self.log.read_text()

    def exit_code(self, within_s: float = TIMEOUT_S) -> int:
        """Wait for the supervisor to exit."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not exit:\n{self.log.read_text()[-4000:]}") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _runs(pid: int, word: str) -> bool:
    return word in _words(pid) and "-m" in _words(pid)


class Cluster:
    """Nodes that share a run."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.nodes: list[Node] = []

    def start(
        self,
        name: str,
        *arguments: str,
        slots: int = 1,
        config: TrainConfig | None = None,
        fault: str = "",
        under: Sequence[str] = (),
    ) -> Node:
        node = Node(config or self.config, name, *arguments, slots=slots, fault=fault, under=under)
        self.nodes.append(node)
        return node

    def wait_for_step(self, step: int) -> None:
        """Wait until the record of the run has reached a step."""
        self.wait(lambda: last_step(Path(self.config.run) / "metrics.jsonl") >= step, f"step {step}")

    def wait_for_commit(self) -> None:
        """Wait until the newest round has committed a step, so that its end does not count as a failure."""
        root = root_of(self.config)
        board = Board(root)
        round_ = board.sealed(board.newest())
        assert round_ is not None
        self.wait(lambda: committed_step(root) > round_.committed_step, "commit")

    def wait_for_round(self, node: Node, number: int) -> None:
        """Wait for the first step of a round in a journal, which may lack that of a round that ends early."""
        self._wait_for_event(node, "first_step", number)

    def wait_for_ranks(self, node: Node, number: int) -> None:
        """Wait until all ranks of a node have started to import, in this round or a later one."""
        self._wait_for_event(node, "first_beat", number)

    def _wait_for_event(self, node: Node, name: str, number: int) -> None:
        self.wait(lambda: any(e["round"] >= number for e in node.events(name)), f"{name} of round {number}")

    def wait(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for a condition; a timeout shows the ends of all logs."""
        end_s = time.monotonic() + TIMEOUT_S
        while not is_so():
            if time.monotonic() > end_s:
                logs = "\n".join(f"{node.name}:\n{node.log.read_text()[-3000:]}" for node in self.nodes)
                raise AssertionError(f"no {what} within {TIMEOUT_S} s\n{logs}")
            time.sleep(0.05)


@contextmanager
def cluster(config: TrainConfig) -> Iterator[Cluster]:
    """Nodes that share a run. All their processes are killed in the end."""
    nodes = Cluster(config)
    try:
        yield nodes
    finally:
        for node in nodes.nodes:
            node.kill()  # first, because it would start others
            while left := node.processes():
                for pid in left:
                    with suppress(ProcessLookupError):  # ranks exit by themselves as well
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)


def config_of(folder: Path, steps: int = 60, every_steps: int = 5) -> TrainConfig:
    """Return a tiny run below `folder`, and create its data set if it does not exist."""
    data = folder / "data"
    if not data.exists():
        write_latents(data)
    return jobs.saving(jobs.small_config(folder / "run", data, "DiT-Ti/2"), steps, every_steps=every_steps)
