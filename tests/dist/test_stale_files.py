"""A stale process that resumes after a later attempt takes nothing away from the run folder.

It is held at a point and stopped with SIGSTOP. It resumes with SIGCONT after the later attempt has committed.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dit_scale.config import TrainConfig, load
from tests.support.ranks import jobs
from tests.support.ranks.points import Hold
from tests.support.ranks.processes import TIMEOUT_S, run, start
from tests.support.ranks.runs import events, kill, steps_of, wait_for, wait_for_event

pytestmark = pytest.mark.dist

STEPS = 12
POINTS = [
    ("after the claim", 1),
    ("before its files", 1),
    ("after the fencing check", 1),
    ("starting its record", 1),
    ("before its own config", 2),
    ("before its names", 1),
    ("setting a name", 3),
    ("setting a name", 4),
    ("after its files", 1),
]
"""Where the stale process is stopped, and at which pass; all points lie before its first step."""


def config_of(folder: Path, data: Path) -> TrainConfig:
    return jobs.saving(jobs.small_config(folder, data), steps=STEPS, every_steps=3)


class Stopped:
    """An attempt that is stopped at a point."""

    def __init__(self, config: TrainConfig, hold: Hold) -> None:
        hold.folder.mkdir()
        self._hold = hold
        self._ranks, self._answers = start(1, jobs.train_held, config, hold, 0)
        self._pid = wait_for(hold, self._answers)
        os.kill(self._pid, signal.SIGSTOP)

    def wake(self) -> str:
        """Let the attempt resume; return how it ended."""
        self._hold.go.touch()
        os.kill(self._pid, signal.SIGCONT)
        error: str = self._answers.get(timeout=TIMEOUT_S)[1]
        return error

    def kill(self) -> None:
        kill(self._ranks)


@contextmanager
def held_live(config: TrainConfig, folder: Path) -> Iterator[Callable[[], None]]:
    """Start the later attempt and hold it after its sixth step. Call the yielded function to release it."""
    hold = Hold(folder / "live", "after the step", 6)
    hold.folder.mkdir()
    ranks, answers = start(1, jobs.train_held, config, hold, 0)

    def go() -> None:
        hold.go.touch()
        assert answers.get(timeout=TIMEOUT_S)[1:] == (None, 0)

    try:
        wait_for(hold, answers)
        yield go
    finally:
        kill(ranks)


@pytest.fixture
def begun(data: Path, tmp_path: Path) -> TrainConfig:
    """A run with a checkpoint, ready to be resumed."""
    config = config_of(tmp_path / "run", data)
    assert run(1, jobs.train, config.model_copy(update={"steps": 3})) == [0]
    return config


@pytest.fixture(params=POINTS, ids=lambda point: f"{point[0]} {point[1]}")
def stopped(request: pytest.FixtureRequest, begun: TrainConfig, tmp_path: Path) -> Iterator[Stopped]:
    point, nth = request.param
    old = begun.model_copy(update={"steps": 99})
    process = Stopped(old, Hold(tmp_path / "old", point, nth))
    yield process
    process.kill()


def test_resumed_after_the_later_attempt_finished(begun: TrainConfig, stopped: Stopped) -> None:
    assert run(1, jobs.train, begun) == [0]
    before = jobs.losses(begun)
    assert "SupersededError" in stopped.wake()
    assert steps_of(begun) == list(range(1, STEPS + 1))
    assert jobs.losses(begun) == before
    assert load(TrainConfig, Path(begun.run) / "config.yaml").steps == STEPS
    assert events(begun, "done")


def test_resumed_while_the_later_attempt_trains(begun: TrainConfig, stopped: Stopped, tmp_path: Path) -> None:
    with held_live(begun, tmp_path) as go:
        wait_for_event(begun, "checkpoint", 2)
        assert "SupersededError" in stopped.wake()
        go()
    assert steps_of(begun) == list(range(1, STEPS + 1))
    assert load(TrainConfig, Path(begun.run) / "config.yaml").steps == STEPS
    assert [(done["attempt"], done["step"]) for done in events(begun, "done")] == [(1, 3), (3, STEPS)]


def test_links_that_a_stale_process_set_before_it_was_killed(begun: TrainConfig, tmp_path: Path) -> None:
    """The next line of the later attempt restores the names."""
    folder = Path(begun.run)
    with held_live(begun, tmp_path) as go:
        for name in ("metrics.jsonl", "config.yaml"):
            (tmp_path / name).write_text("of an old attempt")
            (tmp_path / name).replace(folder / name)
        go()
    assert steps_of(begun) == list(range(1, STEPS + 1))
    assert load(TrainConfig, folder / "config.yaml").steps == STEPS
