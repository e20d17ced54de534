"""The record and the journal of a run, read while it writes them, and compared with another run's."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import EMA
from dit_scale.config import TrainConfig
from dit_scale.telemetry.pace import TIMED_KEYS
from dit_scale.train.run_folder import root_of
from tests.support.ranks.runs import final_files

_TAIL_BYTES = 8192
"""Enough for several lines of metrics.jsonl."""

Row = dict[str, Any]


class Journal:
    """A reader that follows events.jsonl."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.attempts = 0
        self.resumed_step = 0
        """The step from which the newest attempt resumed."""
        self.saves_s: list[float] = []
        """Seconds of each save, from the snapshot to the commit."""

    def follow(self) -> "Journal":
        """Read on from the end of the last call."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                lines = file.read().splitlines(keepends=True)
            for line in complete_lines(lines):
                self._offset += len(line)
                with suppress(json.JSONDecodeError):  # half a line that a killed writer left
                    self._take(json.loads(line))
        return self

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self.attempts += 1
            self.resumed_step = event["step"]
        elif event["event"] == "checkpoint":
            self.saves_s.append(event["seconds"])


def complete_lines(lines: list[bytes]) -> list[bytes]:
    """Drop a last line that is incomplete."""
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def last_step(metrics: Path) -> int:
    """Return the last step in the record; 0 when there is none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = complete_lines(file.read().splitlines(keepends=True))
    return int(json.loads(lines[-1])["step"]) if lines else 0


def rows(config: TrainConfig) -> list[Row]:
    """Return the record, without what depends on time."""
    path = Path(config.run) / "metrics.jsonl"
    lines = complete_lines(path.read_bytes().splitlines(keepends=True)) if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED_KEYS} for line in lines]


def first_difference(got: list[Row], wanted: list[Row]) -> str:
    """Return how `got` differs from the first rows of `wanted`; empty when it does not."""
    if len(got) > len(wanted):
        return f"{len(got)} rows, expected {len(wanted)} at most"
    for number, (row, expected) in enumerate(zip(got, wanted, strict=False), 1):
        if row != expected:
            return f"row {number} is {row}, expected {expected}"
    return ""


def differences_at_the_end(got: TrainConfig, wanted: TrainConfig) -> list[str]:
    """Return what differs between two finished runs: the record, and each rank's file of the last step."""
    found = [first_difference(rows(got), rows(wanted))]
    if len(rows(got)) != len(rows(wanted)):
        found.append(f"{len(rows(got))} rows, expected {len(rows(wanted))}")
    files, expected = final_files(got), final_files(wanted)
    if len(files) != len(expected):
        found.append(f"{len(files)} files of ranks, expected {len(expected)}")
    for rank, (file, other) in enumerate(zip(files, expected, strict=False)):
        if file != other:
            found.append(f"the last file of rank {rank} differs")
    return [text for text in found if text]


def compare_averages(got: TrainConfig, wanted: TrainConfig) -> tuple[int, list[str]]:
    """Return how many steps have stored averages in both runs, and at which of them a file differs."""
    ours, theirs = _averages(got), _averages(wanted)
    both = sorted(ours.keys() & theirs.keys())
    differing = [step for step in both if _files(got, ours[step]) != _files(wanted, theirs[step])]
    return len(both), [f"the stored averages of step {step} differ" for step in differing]


def _averages(config: TrainConfig) -> dict[int, str]:
    """Return step => path."""
    return {average.step: average.path(EMA) for average in committed(root_of(config), EMA)}


def _files(config: TrainConfig, path: str) -> list[bytes]:
    root = root_of(config)
    return [root.read(key) for key, _ in root.list(f"{path}/rank-")]
