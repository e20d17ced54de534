"""Helpers that read a run folder and follow held processes."""

import json
import queue
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dit_scale.checkpoint.attempts import committed
from dit_scale.config import TrainConfig
from dit_scale.journal import read_journal
from dit_scale.train.run_folder import root_of
from tests.support.ranks import jobs
from tests.support.ranks.points import Hold
from tests.support.ranks.processes import TIMEOUT_S, start


def final_files(config: TrainConfig) -> list[bytes]:
    """Return every rank's file of the newest checkpoint: masters, moments, averages."""
    root = root_of(config)
    newest = committed(root)[0]
    assert newest.step == config.steps
    return [root.read(key) for key, _ in root.list(f"{newest.path()}/rank-")]


def events(config: TrainConfig, name: str) -> list[dict[str, Any]]:
    """Return the events of a kind in the journal."""
    journal = read_journal(Path(config.run) / "events.jsonl")
    return [event for event in journal if event["event"] == name]


def steps_of(config: TrainConfig) -> list[int]:
    """Return the step of every line in the record."""
    lines = (Path(config.run) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def wait_for(hold: Hold, answers: Any) -> int:
    """Return the id of the process held at the point; `answers` are those of ranks that ended earlier."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if hold.reached.exists():
            return int(hold.reached.read_text())
        with suppress(queue.Empty):
            raise AssertionError(f"a rank exited before {hold.point!r}: {answers.get(timeout=0.01)}")
    raise AssertionError(f"{hold.point!r} was not reached within {TIMEOUT_S} s")


def wait_for_event(config: TrainConfig, name: str, count: int = 1) -> None:
    """Wait until the journal has this many events of a kind."""
    deadline = time.monotonic() + TIMEOUT_S
    while len(events(config, name)) < count:
        assert time.monotonic() < deadline, f"no {name} entry in the journal"
        time.sleep(0.02)


def kill(processes: Sequence[Any]) -> None:
    """SIGKILL these processes one after the other."""
    for process in processes:
        process.kill()
        process.join()


def kill_at(world: int, config: TrainConfig, folder: Path, *, point: str, nth: int, victim: int) -> None:
    """Start a run and kill it when rank `victim`, or its writer, is held at the point."""
    folder.mkdir()
    hold = Hold(folder, point, nth)
    ranks, answers = start(world, jobs.train_held, config, hold, victim)
    try:
        wait_for(hold, answers)
    finally:
        kill((ranks[victim], *ranks))
