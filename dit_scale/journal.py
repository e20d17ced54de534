"""The journals of a run: one JSON object per line, append-only.

    <run>/events.jsonl               by rank 0: starts, failed steps, log points, saves
    <run>/supervisors/<node>.jsonl   by the supervisor of a node: rounds and their endings

Each entry has the name of its event and two times: by the wall clock, which may jump, and by the monotonic
clock of the node.
"""

import json
import re
import time
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

from dit_scale.lines import Alarm, LineFile, parse_objects, read_lines, read_objects

_LOG = re.compile(r'"event": "log", "attempt": \d+,')
"""Text that only the line of a log point contains, because quotes within other texts are escaped."""

Entry = dict[str, Any]
"""One line of a journal: `event`, `time_s` (since 1970), `monotonic_s`, and details of the event."""


class Event(StrEnum):
    """What a journal entry records. The values are a file format: add to them, never change them."""

    # events.jsonl, by rank 0
    START = "start"
    """An attempt started."""
    FIRST_STEP = "first_step"
    """An attempt took its first step; supervisors record this as well."""
    LOG = "log"
    """A log point."""
    EVALUATION = "evaluation"
    """The weights were evaluated."""
    SKIPPED_STEP = "skipped_step"
    """The guard skipped the update of a step."""
    ROLLBACK = "rollback"
    """The attempt exits so that the run can restart before its failed steps."""
    QUARANTINED = "quarantined"
    """A damaged sample will be replaced from now on."""
    SAVE = "save"
    """A save started."""
    CHECKPOINT = "checkpoint"
    """A save was committed."""
    SAVE_FAILED = "save_failed"
    RETENTION_FAILED = "retention_failed"
    WAITED = "waited"
    """The last save of an attempt was committed."""
    DONE = "done"
    """The run has reached its last step."""
    ALARM = "alarm"
    """Something failed that does not stop the run, such as a mirror or a disk."""

    # supervisors/<node>.jsonl
    JOINED = "joined"
    """The node asked to join a round."""
    ROUND = "round"
    """A round with this node started."""
    RANKS_STARTED = "ranks_started"
    FIRST_BEAT = "first_beat"
    """All ranks of the node have sent a heartbeat."""
    ENGINE_READY = "engine_ready"
    RESTORED = "restored"
    """All ranks of the node have read their part of the checkpoint."""
    STALLED = "stalled"
    """A rank has waited for data for longer than a step takes."""
    ROUND_ENDED = "round_ended"
    RANKS_GONE = "ranks_gone"
    """All ranks of the node have exited."""
    GAVE_UP = "gave_up"
    MADE_WAY = "made_way"
    """The node left because a later start of the job has taken over."""
    PREFLIGHT_FAILED = "preflight_failed"
    BOARD_GONE = "board_gone"


class Journal:
    """Appends events to one journal."""

    def __init__(self, path: Path, alarm: Alarm) -> None:
        self._lines = LineFile(path, alarm)

    def write(self, event: Event, **details: Any) -> None:
        """Append an entry."""
        clocks = {"time_s": time.time(), "monotonic_s": round(time.monotonic(), 6)}
        self._lines.append(json.dumps({**clocks, "event": event, **details}))

    def take_over(self, lines: Iterable[str]) -> None:
        """Append lines from another copy of this journal."""
        if text := "".join(f"{line}\n" for line in lines):
            self._lines.append_lines(text.encode())

    def close(self) -> str:
        """Close the file and return what could not be written; empty if nothing."""
        return self._lines.close()


def read_journal(path: Path) -> list[Entry]:
    """Return the entries of a journal, in order; none if there is no file."""
    return read_objects(path, "event", "time_s")


def read_outline(path: Path) -> list[Entry]:
    """Return the entries of a journal without log points between two log points of the same attempt.

    The outline gives the same ledger up to rounding, and most lines need no parsing.
    """
    kept: list[str] = []
    previous, last = None, ""
    for line in read_lines(path):
        found = _LOG.search(line)
        attempt = found and found[0]
        if attempt and attempt == previous:
            last = line
            continue
        kept += [last, line] if last else [line]
        previous, last = attempt, ""
    return parse_objects([*kept, last], "event", "time_s")
