"""A run by the public command in one process, which tests hold after steps of their choice."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dit_scale.config import TrainConfig, dump
from tests.support.ranks.points import Hold
from tests.support.ranks.processes import TIMEOUT_S


class HeldRun:
    """`dit-scale train`, held by tests.support.ranks.held_train."""

    def __init__(self, config: TrainConfig, folder: Path, steps: Sequence[int], **environment: str) -> None:
        """Hold after each of these steps, counted from the start."""
        folder.mkdir()
        self.log = folder / "log"
        self._holds = [Hold(folder / str(step), "after the step", step) for step in steps]
        for hold in self._holds:
            hold.folder.mkdir()
        (folder / "run.yaml").write_text(dump(config))
        command = [
            sys.executable,
            "-m",
            "tests.support.ranks.held_train",
            str(folder / "run.yaml"),
            "after the step",
        ]
        command += [str(folder), *map(str, steps)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def wait(self) -> None:
        """Wait until the process is held after the next of the steps."""
        self.wait_until(lambda: self._holds[0].reached.exists())

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_so():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def go(self) -> None:
        self._holds.pop(0).go.touch()

    def end(self) -> int:
        """Return its exit code."""
        return self.process.wait(TIMEOUT_S)


@contextmanager
def held_run(
    config: TrainConfig, folder: Path, steps: Sequence[int] = (), **environment: str
) -> Iterator[HeldRun]:
    """Kill the process if it is still running."""
    run = HeldRun(config, folder, steps, **environment)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()
