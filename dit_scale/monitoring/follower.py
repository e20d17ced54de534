"""Follows a run by its files: each look reads only what is new since the last one. No torch.

    <run>/metrics.jsonl             the newest log point and evaluation
    <run>/events.jsonl              attempts, saves, skipped steps
    <run>/supervisors/<node>.jsonl  rounds and why they ended
    heartbeats of the node's ranks  the step that they are at

With checkpoint.url, the run folder may be local to the node. Then a node without rank 0 knows only the last
two.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_scale.config import TrainConfig
from dit_scale.heartbeat import Phase, read_beat
from dit_scale.journal import Entry, Event
from dit_scale.ledger import Ledger
from dit_scale.monitoring.tail import Tail
from dit_scale.report.goodput import ledger
from dit_scale.report.interruptions import Interruption, interruptions
from dit_scale.report.spans import AttemptSpan, attempts_of

Row = dict[str, Any]
"""A row of metrics.jsonl."""

STATES = {
    Event.JOINED: "waiting",
    Event.ROUND: "starting",
    Event.RANKS_STARTED: "starting",
    Event.FIRST_BEAT: "starting",
    Event.ENGINE_READY: "starting",
    Event.RESTORED: "starting",
    Event.FIRST_STEP: "training",
    Event.ROUND_ENDED: "stopping",
    Event.RANKS_GONE: "waiting",
    Event.GAVE_UP: "failed",
    Event.PREFLIGHT_FAILED: "failed",
    Event.BOARD_GONE: "failed",
    Event.MADE_WAY: "stopping",
}
"""Event of a supervisor => what its node does from then on."""


@dataclass(frozen=True)
class Look:
    """What is known of a run at one moment, as its node sees it."""

    state: str
    """What the node does, see `STATES`."""
    step: int
    """Steps taken."""
    row: Row
    """The newest log point; empty before the first."""
    evaluation: Row
    """The newest evaluation; empty before the first."""
    attempt: int
    """Number of the newest attempt; 0 before the first."""
    round: int
    """Number of the newest round of this node; 0 before the first."""
    nodes: int
    """Members of that round."""
    stepping_since_s: float
    """When the newest attempt took its first step, in seconds since 1970; 0 if it has not."""
    checkpoint_step: int
    """Step of the newest committed checkpoint; 0 if there is none."""
    committed_s: float
    """When it was committed, in seconds since 1970; 0 if there is none."""
    events: Counter[str]
    """Entries of the run's journal and this node's, by event, except log points."""
    interruptions: list[Interruption]
    spent: Ledger


@dataclass
class _Journals:
    """Entries of the journals of a run."""

    run: list[Entry] = field(default_factory=list)
    supervisors: dict[str, list[Entry]] = field(default_factory=dict)


class Follower:
    """Follows a run from one of its nodes."""

    def __init__(self, config: TrainConfig, node: str, heartbeats: Path) -> None:
        """`heartbeats` is the folder with a folder of heartbeats per round."""
        folder = Path(config.run)
        self._node, self._folder, self._heartbeats = node, folder, heartbeats
        self._rows = Tail(folder / "metrics.jsonl", "step")
        self._run = Tail(folder / "events.jsonl", "event", "time_s")
        self._supervisors: dict[str, Tail] = {}
        self._journals = _Journals()
        self._row: Row = {}
        self._evaluation: Row = {}

    def look(self, now_s: float) -> Look:
        """Read what is new; `now_s` is the time in seconds since 1970. Raises OSError."""
        self._read_rows()
        self._read_journals()
        journals = self._journals
        attempts = attempts_of(journals.run)
        own = journals.supervisors.get(self._node, [])
        rounds = [entry for entry in own if entry["event"] == Event.ROUND]
        commits = [entry for entry in journals.run if entry["event"] == Event.CHECKPOINT]
        state = next(
            (STATES[entry["event"]] for entry in reversed(own) if entry["event"] in STATES), "waiting"
        )
        is_alive = state in ("starting", "training")
        is_training = bool(attempts) and not attempts[-1].has_exited
        return Look(
            state=state,
            step=self._step(attempts),
            row=self._row,
            evaluation=self._evaluation,
            attempt=attempts[-1].number if attempts else 0,
            round=rounds[-1]["round"] if rounds else 0,
            nodes=len(rounds[-1]["nodes"]) if rounds else 0,
            stepping_since_s=_first_step_s(attempts),
            checkpoint_step=int(commits[-1]["name"].partition("-")[0]) if commits else 0,
            committed_s=commits[-1]["time_s"] if commits else 0.0,
            events=Counter(entry["event"] for entry in (*journals.run, *own)),
            interruptions=interruptions(journals.run, journals.supervisors),
            spent=ledger(journals.run, journals.supervisors, now_s, is_alive and is_training),
        )

    def _read_rows(self) -> None:
        rows, is_other = self._rows.read()
        if is_other:
            self._row, self._evaluation = {}, {}
        for row in rows:
            if "images_per_s" in row:
                self._row = row
            else:
                self._evaluation = row

    def _read_journals(self) -> None:
        journals = self._journals
        for path in sorted((self._folder / "supervisors").glob("*.jsonl")):
            self._supervisors.setdefault(path.stem, Tail(path, "event", "time_s"))
        sources = [(self._run, journals.run)]
        sources += [
            (tail, journals.supervisors.setdefault(node, [])) for node, tail in self._supervisors.items()
        ]
        for tail, entries in sources:
            new, is_other = tail.read()
            if is_other:
                entries.clear()
            for entry in new:
                append(entries, entry)

    def _step(self, attempts: list[AttemptSpan]) -> int:
        """Return the steps taken: by the heartbeats of ranks that train, else by the journal."""
        rounds = sorted(self._heartbeats.glob("round-*"))
        beats = [read_beat(path) for path in (rounds[-1].glob("beat-*") if rounds else ())]
        steps = [beat.step for beat in beats if beat is not None and beat.phase >= Phase.DATA]
        return max(steps, default=attempts[-1].last_step if attempts else 0)


def append(entries: list[Entry], entry: Entry) -> None:
    """Append an entry; of log points in a row, keep only the first and the last.

    Every other entry stays, and `data_s` counts from the start of an attempt. So what follows from the
    journal stays the same, but its length depends on the saves and failures of a run, not on its steps.
    """
    is_third = len(entries) > 1 and all(
        other["event"] == Event.LOG and other.get("attempt") == entry.get("attempt")
        for other in (*entries[-2:], entry)
    )
    if is_third:
        entries[-1] = entry
    else:
        entries.append(entry)


def _first_step_s(attempts: list[AttemptSpan]) -> float:
    """Return when the newest attempt took its first step; 0 if it has not."""
    entries = attempts[-1].entries if attempts else ()
    first = (entry["time_s"] for _, entry in entries if entry["event"] == Event.FIRST_STEP)
    return float(next(first, 0.0))
