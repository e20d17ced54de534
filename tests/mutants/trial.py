"""Trials: run pytest in its own process, on a copy of the tree with one mutant.

The process is forked from one that has imported torch and similar packages, but no module of the project,
so a trial costs only its tests. Trials write only to the copies.
"""

import gc
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

PRELOADED = (
    *("hypothesis.strategies", "numpy", "pydantic", "safetensors.torch", "scipy.stats"),
    *("torch._dynamo", "torch.utils.flop_counter", "xdist.remote", "xdist.scheduler"),
)
"""Packages that most trials import."""
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "runs")
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Trial:
    """Tests to run with `source` in place of one file."""

    tests: tuple[str, ...]
    limit_s: float
    file: str = ""
    source: str = ""


@dataclass(frozen=True)
class Verdict:
    """Result of a trial."""

    exit_code: int | None
    """Exit code of pytest: 1: failed test; 2: failed import; negative: crash. None: timed out."""
    seconds: float
    output: str


@dataclass
class _Slot:
    """A copy of the tree and the process that runs in it."""

    tree: Path
    number: int = 0
    """Number of the trial."""
    trial: Trial | None = None
    process: ForkProcess | None = None
    started_s: float = field(default=0.0)

    @property
    def log(self) -> Path:
        return self.tree.with_suffix(".log")


class Bench:
    """Copies of a tree below `folder`, in which trials run in parallel."""

    def __init__(self, root: Path, folder: Path, jobs: int) -> None:
        for name in PRELOADED:
            importlib.import_module(name)
        gc.freeze()  # so that garbage collection in a fork does not touch shared pages
        self._root = root
        self._slots = [_Slot(folder / f"tree{job}") for job in range(jobs)]
        for slot in self._slots:
            shutil.copytree(root, slot.tree, ignore=NOT_COPIED)

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Verdict]]:
        """Yield number and verdict of each trial as it finishes."""
        waiting = list(enumerate(trials))[::-1]
        try:
            while waiting or any(slot.process for slot in self._slots):
                for slot in self._slots:
                    if slot.process is None and waiting:
                        self._start(slot, *waiting.pop())
                wait([slot.process.sentinel for slot in self._slots if slot.process], timeout=0.2)
                for slot in self._slots:
                    verdict = self._verdict(slot)
                    if verdict is not None:
                        yield slot.number, verdict
        finally:
            for slot in self._slots:
                if slot.process is not None:
                    self._end(slot)

    def _start(self, slot: _Slot, number: int, trial: Trial) -> None:
        if trial.file:
            (slot.tree / trial.file).write_text(trial.source)
        slot.number, slot.trial, slot.started_s = number, trial, time.monotonic()
        slot.process = _FORK.Process(target=_run_tests, args=(slot.tree, slot.log, trial.tests))
        slot.process.start()

    def _verdict(self, slot: _Slot) -> Verdict | None:
        if slot.process is None:
            return None
        assert slot.trial is not None
        seconds = time.monotonic() - slot.started_s
        exit_code = slot.process.exitcode
        if exit_code is None and seconds < slot.trial.limit_s:
            return None
        self._end(slot)
        return Verdict(exit_code, seconds, slot.log.read_text(errors="replace"))

    def _end(self, slot: _Slot) -> None:
        """Kill the processes of a trial and restore the original file."""
        assert slot.process is not None
        assert slot.trial is not None
        with suppress(ProcessLookupError):
            os.killpg(slot.process.pid or 0, signal.SIGKILL)
        slot.process.kill()  # it may not have created its process group yet
        slot.process.join()
        slot.process = None
        if slot.trial.file:
            shutil.copy2(self._root / slot.trial.file, slot.tree / slot.trial.file)


def _run_tests(tree: Path, log: Path, tests: Sequence[str]) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    # This process and its children must import the copy. A bytecode cache would confuse two mutants that have
    # the same size and the same modification time in seconds.
    os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(tree))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    options = ("-x", "-q", "--no-header", "-p", "no:cacheprovider", f"--basetemp={tree.with_suffix('.tmp')}")
    # hypothesis, a pytest plugin, is already imported
    warnings = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
    sys.exit(pytest.main([*options, *warnings, *tests]))
