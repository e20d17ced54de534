"""The journals of a run: one JSON object per line, append-only.

    <run>/events.jsonl               by rank 0: starts, steps that stand out, log points, saves
    <run>/supervisors/<node>.jsonl   by the supervisor of a node: rounds and how they ended

Each line has the event's name and two clocks: the wall clock, which may jump, and the node's monotonic one.
"""

import json
import time
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

from dit_scale.lines import Alarm, LineFile, read_objects

Entry = dict[str, Any]
"""One line of a journal: `event`, `time_s` (since 1970), `monotonic_s`, and the details of the event."""


class Event(StrEnum):
    """What a line of a journal is about. The values are a file format: add to them, never change them."""

    # events.jsonl, by rank 0
    START = "start"
    """An attempt began."""
    FIRST_STEP = "first_step"
    """The first step of an attempt was taken; supervisors record it as well."""
    LOG = "log"
    """A log point."""
    SKIPPED_STEP = "skipped_step"
    """The guard left out the update of a step."""
    ROLLBACK = "rollback"
    QUARANTINED = "quarantined"
    """A damaged sample is replaced from now on."""
    SAVE = "save"
    """A save began."""
    CHECKPOINT = "checkpoint"
    """A save was committed."""
    SAVE_FAILED = "save_failed"
    RETENTION_FAILED = "retention_failed"
    WAITED = "waited"
    """The last save of an attempt was committed."""
    DONE = "done"
    ALARM = "alarm"
    """A disk or a mirror failed; the run itself is unchanged."""

    # supervisors/<node>.jsonl
    JOINED = "joined"
    """The node asked to take part in a round."""
    ROUND = "round"
    """A round with this node began."""
    RANKS_STARTED = "ranks_started"
    FIRST_BEAT = "first_beat"
    """All ranks of the node have sent a heartbeat."""
    ENGINE_READY = "engine_ready"
    RESTORED = "restored"
    STALLED = "stalled"
    """A rank waits for data longer than a step takes."""
    ROUND_ENDED = "round_ended"
    RANKS_GONE = "ranks_gone"
    GAVE_UP = "gave_up"
    MADE_WAY = "made_way"
    """The node left because a later start of the job took over."""
    PREFLIGHT_FAILED = "preflight_failed"
    BOARD_GONE = "board_gone"


class Journal:
    """Appends events to one journal."""

    def __init__(self, path: Path, alarm: Alarm) -> None:
        self._lines = LineFile(path, alarm)

    def write(self, event: Event, **details: Any) -> None:
        clocks = {"time_s": time.time(), "monotonic_s": round(time.monotonic(), 6)}
        self._lines.append(json.dumps({**clocks, "event": event, **details}))

    def take_over(self, lines: Iterable[str]) -> None:
        """Add lines of another copy of this journal."""
        if text := "".join(f"{line}\n" for line in lines):
            self._lines.append_lines(text.encode())

    def close(self) -> str:
        """Returns what could not be written, in words; empty when all was."""
        return self._lines.close()


def read_journal(path: Path) -> list[Entry]:
    """The entries of a journal, in order; none when there is no file."""
    return read_objects(path, "event", "time_s")
