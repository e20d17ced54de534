"""Attempts, nodes and failures of a run on one axis of wall-clock time."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dit_scale.journal import Entry, Event
from dit_scale.report.interruptions import Interruption
from dit_scale.report.spans import MICRO, AttemptSpan, RoundSpan

MAX_LANES = 16
"""Nodes shown on the time line; those with failures come first."""
MAX_BARS = 400
"""Newest attempts, rounds and failures shown."""
UNKNOWN = "unknown"
"""Shown as the node of a failure that no supervisor recorded."""


@dataclass(frozen=True)
class Bar:
    """A stretch of time."""

    begin: float
    """Begin and end are shares of the time line, 0 to 1."""
    end: float
    kind: str
    """starting or training of an attempt; member of a node."""
    text: str


@dataclass(frozen=True)
class Mark:
    """A failure."""

    at: float
    """Share of the time line, 0 to 1."""
    text: str


@dataclass(frozen=True)
class Lane:
    """A row of the time line."""

    name: str
    bars: list[Bar]
    marks: list[Mark]


@dataclass(frozen=True)
class Timeline:
    """What happened when."""

    begin_s: float
    """Seconds since 1970."""
    end_s: float
    lanes: list[Lane]
    """The attempts, then the nodes."""
    left_out: int
    """Nodes that are not shown."""


def timeline_of(
    attempts: Sequence[AttemptSpan],
    rounds: Sequence[RoundSpan],
    supervisors: Mapping[str, Sequence[Entry]],
    interruptions: Sequence[Interruption],
    end_s: float,
) -> Timeline | None:
    """Return the time line of a run up to `end_s`; None if nothing has started."""
    times_us = [us for span in attempts for us in (span.start_us, span.last_entry_us)]
    times_us += [us for span in rounds for us in (span.start_us, span.last_entry_us)]
    if not times_us:
        return None
    begin_s = min(times_us) / MICRO
    scale = _Scale(begin_s, max(end_s, max(times_us) / MICRO, begin_s + 1e-3))
    failures: dict[str, list[Mark]] = {}
    for one in interruptions[-MAX_BARS:]:
        where = f", rank {one.rank}" if one.rank is not None else ""
        mark = Mark(scale.share(one.at_s), f"{one.reason}{where}, {one.lost_steps} steps lost")
        failures.setdefault(one.node, []).append(mark)
    members = _members(supervisors)
    nodes = sorted(
        members.keys() | failures.keys() - {""}, key=lambda node: (-len(failures.get(node, ())), node)
    )
    lanes = [Lane("attempts", _attempt_bars(attempts, rounds, scale), failures.get("", []))]
    for node in sorted(nodes[:MAX_LANES]):
        bars = [
            _bar(scale, span, "member", f"round {span.number}")
            for span in rounds[-MAX_BARS:]
            if span.number in members.get(node, ())
        ]
        lanes.append(Lane(node, bars, failures.get(node, [])))
    return Timeline(scale.begin_s, scale.end_s, lanes, max(0, len(nodes) - MAX_LANES))


def by_cause(interruptions: Sequence[Interruption]) -> tuple[list[str], list[tuple[str, list[int], int]]]:
    """Return the causes, and for each node its failures by cause and the steps lost with them."""
    causes = [cause for cause, _ in Counter(one.reason for one in interruptions).most_common()]
    rows = []
    for node in sorted({one.node for one in interruptions}):
        own = [one for one in interruptions if one.node == node]
        counts = Counter(one.reason for one in own)
        rows.append(
            (node or UNKNOWN, [counts[cause] for cause in causes], sum(one.lost_steps for one in own))
        )
    return causes, rows


class _Scale:
    """Turns times into shares of a time line."""

    def __init__(self, begin_s: float, end_s: float) -> None:
        self.begin_s, self.end_s = begin_s, end_s

    def share(self, at_s: float) -> float:
        """Return the place of a time, 0 to 1."""
        return min(1.0, max(0.0, (at_s - self.begin_s) / (self.end_s - self.begin_s)))


def _attempt_bars(attempts: Sequence[AttemptSpan], rounds: Sequence[RoundSpan], scale: _Scale) -> list[Bar]:
    """Return two bars per attempt; the first starts with its round, or after the attempt before it."""
    bars = []
    before_us = 0
    for attempt in attempts[-MAX_BARS:]:
        of_rounds_us = [span.start_us for span in rounds if span.start_us <= attempt.start_us]
        start_us = max(before_us, *of_rounds_us[-1:]) if of_rounds_us else attempt.start_us
        before_us = attempt.last_entry_us
        start, end = (scale.share(us / MICRO) for us in (start_us, attempt.last_entry_us))
        stepped_us = [us for us, entry in attempt.entries if entry["event"] == Event.FIRST_STEP]
        first = scale.share(stepped_us[0] / MICRO) if stepped_us else end
        text = f"attempt {attempt.number}, steps {attempt.first_step} to {attempt.last_step}"
        bars += [Bar(start, first, "starting", f"{text}: starting"), Bar(first, end, "training", text)]
    return bars


def _members(supervisors: Mapping[str, Sequence[Entry]]) -> dict[str, set[int]]:
    """Return the rounds of each node."""
    members: dict[str, set[int]] = {}
    for entries in supervisors.values():
        for entry in entries:
            if entry["event"] == Event.ROUND:
                for node in entry["nodes"]:
                    members.setdefault(node, set()).add(int(entry["round"]))
    return members


def _bar(scale: _Scale, span: RoundSpan, kind: str, text: str) -> Bar:
    end_s = (span.exited_us or span.end_us or span.last_entry_us) / MICRO
    is_open = span.exited_us is None and span.end_us is None
    return Bar(scale.share(span.start_us / MICRO), 1.0 if is_open else scale.share(end_s), kind, text)
