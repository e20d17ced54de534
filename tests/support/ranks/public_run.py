"""A run known only by its folder and its command: started, watched and compared as a user would.

There are two ways to start it: `dit-scale launch`, or `dit-scale train` once per rank, as a plain launcher
does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dit_scale.config import TrainConfig, dump
from dit_scale.elastic.node.processes import is_alive
from dit_scale.telemetry.pace import TIMED_KEYS
from tests.support.faults.ports import free_port
from tests.support.speed import scaled

LIMIT_S = scaled(600.0)
"""Far more than a complete run takes; a slower process hangs."""
POLL_S = 0.01

Form = Literal["launch", "ranks"]


class RunError(Exception):
    """The run did something that it should not do."""


@dataclass(frozen=True)
class Shape:
    """How a run is spread over processes. The bits of its results depend on it."""

    world: int
    stage: Literal[1, 2, 3]

    def __str__(self) -> str:
        return f"{self.world} x ZeRO-{self.stage}"


@dataclass
class Started:
    """One start of the command: the process of a supervisor, or those of the ranks."""

    form: Form
    processes: list[subprocess.Popen[bytes]]
    log: Path
    mark: str
    """A variable in the environment of all its processes."""
    begin_bytes: int
    """Size of the log before the start."""
    codes: list[int] = field(default_factory=list)

    def text(self) -> str:
        """Return its output."""
        return self.log.read_bytes()[self.begin_bytes :].decode(errors="replace")

    def family(self) -> dict[int, str]:
        """Return its running processes with their roles: supervisor, launcher, ranks, writers."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if is_alive(int(folder.name)):
                        found[int(folder.name)] = _role(words)
        return found

    def is_over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        for pid in self.family():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, within_s: float = LIMIT_S) -> list[int]:
        """Return the exit codes in order of the ranks; raise RunError when it does not exit."""
        end_s = time.monotonic() + within_s
        while not self.is_over():
            if time.monotonic() > end_s:
                raise RunError(f"did not exit within {within_s:g} s:\n{self.text()[-3000:]}")
            time.sleep(POLL_S)
        return [process.wait() for process in self.processes]

    def kill(self) -> None:
        """Kill its remaining processes."""
        for process in self.processes:
            process.kill()  # the supervisor first: it would start others
        while family := self.family():
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.processes:
                process.wait()
            time.sleep(POLL_S)


class PublicRun:
    """A run in a folder. The file `log` next to the folder collects the output of all starts."""

    def __init__(self, config: TrainConfig, shape: Shape) -> None:
        self.config, self.shape = config, shape
        self.folder = Path(config.run)
        self.log = self.folder.parent / f"{self.folder.name}.log"
        self._file = self.folder.parent / f"{self.folder.name}.yaml"
        self._file.write_text(dump(config))
        self._starts: list[Started] = []

    def start(self, form: Form) -> Started:
        """Start the run, or resume it."""
        self.log.touch()
        mark = f"DIT_SCALE_CAMPAIGN={os.getpid()}-{self.folder.name}-{len(self._starts)}"
        begin = self.log.stat().st_size
        with self.log.open("ab") as log:
            processes = [
                subprocess.Popen(command, stdout=log, stderr=log, env=_environment() | variables)
                for command, variables in self._commands(form, dict([mark.split("=")]))
            ]
        started = Started(form, processes, self.log, mark, begin)
        self._starts.append(started)
        return started

    def _commands(self, form: Form, mark: dict[str, str]) -> Iterator[tuple[list[str], dict[str, str]]]:
        program = [sys.executable, "-m", "dit_scale.cli"]
        if form == "launch":
            slots = ["--slots", str(self.shape.world), "--node", "one", "--address", "127.0.0.1"]
            yield [*program, "launch", str(self._file), *slots, "--lease-s", str(scaled(30.0))], mark
            return
        port = str(free_port())
        for rank in map(str, range(self.shape.world)):
            meeting = {"WORLD_SIZE": str(self.shape.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            yield [*program, "train", str(self._file)], mark | meeting | {"RANK": rank, "LOCAL_RANK": rank}

    def end_all(self) -> None:
        """Kill the remaining processes of all starts."""
        for started in self._starts:
            started.kill()

    def commits(self) -> int:
        """Return all checkpoints that were committed so far, including deleted ones."""
        journal = self.folder / "events.jsonl"
        text = journal.read_bytes() if journal.exists() else b""
        return text.count(b'"event": "checkpoint"')

    def text(self) -> str:
        """Return the output of all starts."""
        return self.log.read_text(errors="replace")


def wait_until(is_so: Callable[[], bool], started: Started) -> bool:
    """Wait for a condition. Return False when the start exits first; raise RunError when neither happens."""
    end_s = time.monotonic() + LIMIT_S
    while not is_so():
        if started.is_over():
            return False
        if time.monotonic() > end_s:
            raise RunError(f"no progress within {LIMIT_S:g} s:\n{started.text()[-3000:]}")
        time.sleep(POLL_S)
    return True


def record_lines(run: PublicRun) -> list[dict[str, object]]:
    """Return the complete lines of the record, without what depends on time."""
    path = run.folder / "metrics.jsonl"
    text = path.read_bytes() if path.exists() else b""
    lines = []
    for line in text.splitlines(keepends=True):
        if line.endswith(b"\n"):
            lines.append({key: value for key, value in json.loads(line).items() if key not in TIMED_KEYS})
    return lines


def _environment() -> dict[str, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("DS_ACCELERATOR", None)
    return environment


def _role(words: list[str]) -> str:
    for word, role in {
        "launch": "supervisor",
        "deepspeed.launcher.launch": "launcher",
        "dit_scale.checkpoint.writer": "writer",
        "train": "rank",
    }.items():
        if word in words:
            return role
    return "other"
