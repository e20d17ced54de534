"""Workers of `dit-scale sample` as real processes, which a test can hold at a point and kill.

They are forked from a server that has loaded torch and diffusers, so starts are cheap.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dit_scale.cli import main
from dit_scale.sampling import assembly, sample_folder
from tests.support.speed import scaled

LIMIT_S = scaled(300.0)
POINTS: dict[str, tuple[Any, str]] = {
    "part half written": (sample_folder, "write_npz"),
    "npz half written": (assembly, "write_npz"),
    "npz written": (assembly, "check_npz"),
    "npz checked": (assembly, "write_grid"),
    "grid written": (assembly, "sealed"),
    "mark written": (sample_folder.SampleFolder, "discard_parts"),
}
"""Point => the object and the name of the function whose call it is."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.sampling_preload"])


@dataclass(frozen=True)
class Workers:
    """The workers of one start of the command."""

    processes: Sequence[Any]
    log: Path

    def said(self) -> str:
        """Return their output so far."""
        return self.log.read_text()

    def alive(self) -> bool:
        """Whether any of them is running."""
        return any(process.is_alive() for process in self.processes)

    def finish(self) -> str:
        """Wait for all; return what they said. None may fail."""
        assert self.codes() == [0] * len(self.processes), self.said()
        return self.said()

    def codes(self) -> list[int | None]:
        """Wait for all; return their exit codes."""
        for process in self.processes:
            process.join(LIMIT_S)
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """Send SIGKILL to all."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def start(
    arguments: Sequence[str], log: Path, world: int = 1, hold: tuple[str, Path] | None = None
) -> Workers:
    """Start `dit-scale sample` as a launcher does. `hold`: a point, and the file that marks its arrival."""
    log.touch()
    processes = [
        _context.Process(target=_work, args=(list(arguments), log, rank, world, hold), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return Workers(processes, log)


def wait_until(happened: Callable[[], bool], workers: Workers) -> None:
    """Watch without a pause until something has happened; fail if the workers end before."""
    until = time.monotonic() + LIMIT_S
    while not happened():
        assert time.monotonic() < until, workers.said()
        assert workers.alive() or happened(), workers.said()


def _work(arguments: list[str], log: Path, rank: int, world: int, hold: tuple[str, Path] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    sys.argv = ["dit-scale", "sample", *arguments]
    with ExitStack() as stack:
        if hold:
            owner, function = POINTS[hold[0]]
            stack.enter_context(patch.object(owner, function, _held(*hold)))
        sys.exit(main())


def _held(point: str, mark: Path) -> Callable[..., None]:
    def hold(*args: Any, **named: Any) -> None:
        if "half" in point:
            target = Path(args[2])
            target.parent.mkdir(parents=True, exist_ok=True)
            (target.parent / f".{target.name}.0123456789abcdef.tmp").write_bytes(b"PK\3\4 half a file")
        mark.touch()
        while True:
            time.sleep(1)

    return hold
