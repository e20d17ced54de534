"""Attempts, nodes and failures of a run on one axis of wall-clock time."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dit_scale.journal import Entry, Event
from dit_scale.report.interruptions import Interruption
from dit_scale.report.spans import MICRO, AttemptSpan, RoundSpan

MAX_LANES = 16
"""Nodes shown on the time line; those with failures come first."""
MAX_BARS = 100
"""Newest attempts, rounds and failures shown."""
WIDTH, HEIGHT = 10_000, 14
"""Units of a lane."""
UNKNOWN = "unknown"
"""Shown as the node of a failure that no supervisor recorded."""


Bar = tuple[float, float]
"""A stretch of time: begin and end as shares of the time line, 0 to 1."""


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
    bars: dict[str, list[Bar]]
    """By kind: starting and training of an attempt, member of a round."""
    marks: list[Mark]

    @property
    def paths(self) -> dict[str, str]:
        """The bars by kind as an SVG path, WIDTH wide and HEIGHT high; each has at least one unit."""
        return {kind: "".join(map(_rectangle, bars)) for kind, bars in self.bars.items() if bars}


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
        own = [span for span in rounds[-MAX_BARS:] if span.number in members.get(node, ())]
        lanes.append(Lane(node, {"member": [_bar(span, scale) for span in own]}, failures.get(node, [])))
    return Timeline(scale.begin_s, scale.end_s, lanes, max(0, len(nodes) - MAX_LANES))


def by_cause(interruptions: Sequence[Interruption]) -> tuple[list[str], list[tuple[str, list[int], int]]]:
    """Return the causes, and for each node its failures by cause and the steps lost; the worst node first."""
    causes = [cause for cause, _ in Counter(one.reason for one in interruptions).most_common()]
    rows = []
    for node, _ in Counter(sorted(one.node for one in interruptions)).most_common():
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


def _attempt_bars(
    attempts: Sequence[AttemptSpan], rounds: Sequence[RoundSpan], scale: _Scale
) -> dict[str, list[Bar]]:
    """Return the bars of attempts; an attempt starts with its round, or after the attempt before it."""
    starting, training = list[Bar](), list[Bar]()
    before_us = 0
    for attempt in attempts[-MAX_BARS:]:
        of_rounds_us = [span.start_us for span in rounds if span.start_us <= attempt.start_us]
        start_us = max(before_us, *of_rounds_us[-1:]) if of_rounds_us else attempt.start_us
        before_us = attempt.last_entry_us
        start, end = (scale.share(us / MICRO) for us in (start_us, attempt.last_entry_us))
        stepped_us = [us for us, entry in attempt.entries if entry["event"] == Event.FIRST_STEP]
        first = scale.share(stepped_us[0] / MICRO) if stepped_us else end
        starting.append((start, first))
        training += [(first, end)] if stepped_us else []
    return {"starting": starting, "training": training}


def _members(supervisors: Mapping[str, Sequence[Entry]]) -> dict[str, set[int]]:
    """Return the rounds of each node."""
    members: dict[str, set[int]] = {}
    for entries in supervisors.values():
        for entry in entries:
            if entry["event"] == Event.ROUND:
                for node in entry["nodes"]:
                    members.setdefault(node, set()).add(int(entry["round"]))
    return members


def _bar(span: RoundSpan, scale: _Scale) -> Bar:
    """Return the bar of a round, which reaches the end of the time line while the round is open."""
    end_us = span.end_us if span.exited_us is None else span.exited_us
    return scale.share(span.start_us / MICRO), 1.0 if end_us is None else scale.share(end_us / MICRO)


def _rectangle(bar: Bar) -> str:
    begin, end = (round(WIDTH * share) for share in bar)
    return f"M{begin} 0h{max(1, end - begin)}v{HEIGHT}H{begin}z"
