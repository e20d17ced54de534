"""Where the time of a run went: a ledger of its wall clock, from its journals alone. No torch.

    <run>/events.jsonl               by rank 0: starts, first steps, log points, saves
    <run>/supervisors/<node>.jsonl   by the supervisor of a node: rounds, failures noticed, rounds ended

Every moment between the first event and the last belongs to one heading, so the ledger sums to the wall
clock exactly, whatever the journals hold. Clocks: what one process wrote is measured by the monotonic clock
of its node; only where a process or a round begins is the wall clock asked. Of a round, the journal of the
node with rank 0 counts, or another if that one did not see the end, so clocks of different nodes meet only
where that changes. A wall clock that jumps shifts the time between two processes, never within one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from dit_scale.journal import Entry, Event

ENDS = (Event.DONE, Event.WAITED, Event.ROLLBACK)
"""What an attempt does last when it ends by itself."""
MICRO = 1_000_000
"""Times are whole microseconds here, so that sums are exact."""


class Heading(IntEnum):
    """What time is spent on; where two claim the same moment, the later in this list has it."""

    STOPPED = 0
    """Nobody ran, as far as the journals tell."""
    WAITING = 1
    """Supervisors were there, and waited for nodes or for the end of old processes."""
    RESTART = 2
    """Old ranks are ended; from the start of a round to the end of its first step, which may compile: the
    launcher, imports, process group, engine."""
    STARTUP = 3
    """The same for the first start of the run, up to its first step or its failure."""
    REPLAYED = 4
    """Steps that did not last: a later attempt took them again, or will have to."""
    PRODUCTIVE = 5
    """Steps that count."""
    DATA = 6
    """Rank 0 waited for a batch. Other ranks' waits look like work here, for all wait for each other."""
    CHECKPOINT = 7
    """Training stood still for a save: the copy to host memory, or the wait for the last commit."""
    RESTORE = 8
    """A checkpoint was found and read."""
    DETECT = 9
    """From the last sign of a rank that stood still to the end of the round. Where nobody knows since when,
    the time until then counts as steps."""


@dataclass(frozen=True)
class AttemptSpan:
    """What one attempt wrote."""

    number: int
    events: tuple[tuple[int, Entry], ...]
    """(time in us, event), ascending."""

    @property
    def begin_us(self) -> int:
        return self.events[0][0]

    @property
    def last_event(self) -> Entry:
        """What it did last; an alarm may follow when its files are closed."""
        told = (event for _, event in reversed(self.events) if event["event"] != Event.ALARM)
        return next(told, self.events[-1][1])

    @property
    def first_step(self) -> int:
        """Steps that were taken before it."""
        return int(self.events[0][1]["step"])

    @property
    def last_step(self) -> int:
        """Steps taken when it last wrote."""
        return max(int(event["step"]) for _, event in self.events)


@dataclass(frozen=True)
class RoundSpan:
    """A round as one node saw it."""

    number: int
    begin_us: int
    seen_us: int | None
    """When it was known to have ended; None while it runs."""
    silent_us: int
    """Before that, without a sign of the rank that stood still; 0 where nobody knows."""
    end_us: int | None
    """When its ranks were gone; None while they may be there."""
    sign_us: int
    """When the node last wrote of it."""
    ended: Entry
    """The event that says why; empty while it runs."""

    @property
    def goes_on(self) -> bool:
        """Whether another round follows without the help of a scheduler or a person."""
        return self.ended.get("reason") not in ("done", "leaving", "mistake")


@dataclass(frozen=True)
class Ledger:
    """Microseconds by heading, and of the whole."""

    begin_us: int
    end_us: int
    spent_us: Mapping[Heading, int]

    @property
    def goodput(self) -> float:
        """The part of the wall clock that went into steps that count, 0 to 1."""
        wall_us = self.end_us - self.begin_us
        return self.spent_us[Heading.PRODUCTIVE] / wall_us if wall_us else 0.0


def attempts_of(journal: Iterable[Entry]) -> list[AttemptSpan]:
    """The attempts in events.jsonl, ascending; none begins before the one before it."""
    by_number: dict[int, list[Entry]] = {}
    for event in journal:
        if {"attempt", "step"} <= event.keys():  # else no line that a run has written
            by_number.setdefault(int(event["attempt"]), []).append(event)
    found: list[AttemptSpan] = []
    for number, events in sorted(by_number.items()):
        earliest_us = found[-1].begin_us if found else 0
        found.append(AttemptSpan(number, tuple(zip(_times(events, earliest_us), events, strict=True))))
    return found


def rounds_of(supervisors: Mapping[str, Sequence[Entry]]) -> list[RoundSpan]:
    """The rounds in the journals of all nodes, ascending; each by the node that saw most of it."""
    by_round: dict[int, dict[str, list[Entry]]] = {}
    for node, events in supervisors.items():
        for event in events:
            if "round" in event:
                by_round.setdefault(int(event["round"]), {}).setdefault(node, []).append(event)
    found: list[RoundSpan] = []
    for number, by_node in sorted(by_round.items()):
        begun = {node: begin for node, events in by_node.items() if (begin := _from_its_begin(events))}
        if begun:
            head = next(iter(begun.values()))[0]["nodes"][0]
            node = max(begun, key=lambda node: (_saw_the_end(begun[node]), node == head))
            found.append(_round(number, begun[node], found[-1].begin_us if found else 0))
    return found


def ledger(
    journal: Iterable[Entry],
    supervisors: Mapping[str, Sequence[Entry]],
    until_s: float | None = None,
    alive: bool = False,
) -> Ledger:
    """Where the wall clock of a run went, up to its last event, or to `until_s` (seconds since 1970).

    `alive`: the last attempt is at work until then, and none of its steps is lost yet.
    """
    attempts, rounds = attempts_of(journal), rounds_of(supervisors)
    joined = [e for events in supervisors.values() for e in events if e["event"] == Event.JOINED]
    times_us = [at_us for attempt in attempts for at_us, _ in attempt.events]
    times_us += [us for r in rounds for us in (r.begin_us, r.seen_us, r.end_us) if us is not None]
    times_us += [_micro(event["time_s"]) for event in joined]
    begin_us = min(times_us, default=_micro(until_s or 0.0))
    end_us = max(times_us, default=begin_us) if until_s is None else max(begin_us, _micro(until_s))
    spans = _Spans(begin_us, end_us)
    for before, span, after in zip((None, *rounds), rounds, (*rounds[1:], None), strict=False):
        spans.paint(Heading.WAITING, _waits_since(before, span, joined), span.begin_us)
        closed_us = _last_sign(span, attempts, after) if after else end_us
        spans.paint(Heading.RESTART, span.begin_us, closed_us if span.end_us is None else span.end_us)
        if span.seen_us is not None:
            spans.paint(Heading.DETECT, max(span.begin_us, span.seen_us - span.silent_us), span.seen_us)
    spans.paint(Heading.STARTUP, *_startup(attempts, rounds, end_us))
    if rounds and rounds[-1].goes_on and rounds[-1].end_us is not None:
        spans.paint(Heading.WAITING, rounds[-1].end_us, end_us)
    newest = rounds[-1].number if rounds else 0
    for event in joined:
        if event["round"] > newest:
            spans.paint(Heading.WAITING, _micro(event["time_s"]), end_us)
    for attempt, limit in zip(attempts, _lasting(attempts, alive), strict=True):
        at_work = alive and attempt is attempts[-1]
        _paint_attempt(spans, attempt, limit, end_us if at_work else _work_until(attempt, attempts, rounds))
    return Ledger(begin_us, end_us, spans.sums())


def _micro(seconds: float) -> int:
    return round(seconds * MICRO)


def _times(events: Sequence[Entry], earliest_us: int) -> list[int]:
    """When the events of one process were, in us: the first by the wall clock, the others after it."""
    at_us = max(earliest_us, _micro(events[0]["time_s"]))
    times = [at_us]
    for before, event in pairwise(events):
        clock = "monotonic_s" if "monotonic_s" in before and "monotonic_s" in event else "time_s"
        at_us += max(0, _micro(event[clock] - before[clock]))
        times.append(at_us)
    return times


def _from_its_begin(events: list[Entry]) -> list[Entry]:
    """Without those of nodes that wait for the round."""
    names = [event["event"] for event in events]
    return events[names.index(Event.ROUND) :] if Event.ROUND in names else []


def _saw_the_end(events: Sequence[Entry]) -> bool:
    return any(event["event"] == Event.ROUND_ENDED for event in events)


def _round(number: int, events: list[Entry], earliest_us: int) -> RoundSpan:
    times = dict(zip([event["event"] for event in events], _times(events, earliest_us), strict=True))
    ended = next((event for event in events if event["event"] == Event.ROUND_ENDED), {})
    seen_us = times.get(Event.ROUND_ENDED)
    silent_us = _micro(ended.get("details", {}).get("age_s", 0.0))
    return RoundSpan(
        number,
        times[Event.ROUND],
        seen_us,
        silent_us,
        times.get(Event.RANKS_GONE, seen_us),
        max(times.values()),
        ended,
    )


def _last_sign(span: RoundSpan, attempts: Sequence[AttemptSpan], after: RoundSpan) -> int:
    """The last that was heard of a round whose end nobody saw."""
    of_span = [a.events[-1][0] for a in attempts if span.begin_us <= a.begin_us < after.begin_us]
    return max(span.sign_us, *of_span, 0)


def _waits_since(before: RoundSpan | None, span: RoundSpan, joined: Iterable[Entry]) -> int:
    """Since when somebody waited for this round to begin."""
    ended_us = before.end_us or before.sign_us if before else 0
    if before is not None and before.ended and before.goes_on:
        return ended_us
    asked_us = [_micro(event["time_s"]) for event in joined if event["round"] == span.number]
    return max(ended_us, min(asked_us, default=span.begin_us))


def _lasting(attempts: Sequence[AttemptSpan], alive: bool) -> list[float]:
    """Of each attempt the last step that no later one takes again; of the last one, what is committed."""
    committed = [
        int(event["name"].partition("-")[0])
        for attempt in attempts
        for _, event in attempt.events
        if event["event"] == Event.CHECKPOINT
    ]
    limit = float("inf") if alive else float(max(committed, default=0))
    limits: list[float] = []
    for attempt in reversed(attempts):
        limits.append(limit)
        limit = min(limit, attempt.first_step)
    return limits[::-1]


def _startup(attempts: Sequence[AttemptSpan], rounds: Sequence[RoundSpan], end_us: int) -> tuple[int, int]:
    """From when to when the first start took: to its first step, or to its end without one."""
    events = attempts[0].events if attempts else ()
    stepped = [at_us for at_us, event in events if event["event"] == Event.FIRST_STEP]
    if rounds and not (events and events[0][0] < rounds[0].begin_us):
        first, *later = rounds
        over_us = first.seen_us or (_last_sign(first, attempts, later[0]) if later else end_us)
        return first.begin_us, min([*stepped, over_us])
    return (events[0][0], (stepped or [events[-1][0]])[0]) if events else (end_us, end_us)


def _work_until(attempt: AttemptSpan, attempts: Sequence[AttemptSpan], rounds: Sequence[RoundSpan]) -> int:
    """When an attempt was last at work: at its last event, or when its round was seen to have failed."""
    last_us = attempt.events[-1][0]
    if attempt.last_event["event"] in ENDS:
        return last_us
    for span in reversed(rounds):
        if span.begin_us <= attempt.begin_us:
            later = [a for a in attempts if a.number > attempt.number and a.begin_us <= (span.seen_us or 0)]
            if later or span.seen_us is None or attempt.begin_us > span.seen_us:
                return last_us
            return max(last_us, span.seen_us - span.silent_us)
    return last_us


def _paint_attempt(spans: "_Spans", attempt: AttemptSpan, limit: float, until_us: int) -> None:
    begin_us, start = attempt.events[0]
    spans.paint(Heading.RESTORE, begin_us - _micro(start.get("restore_s", 0.0)), begin_us)
    names = [event["event"] for _, event in attempt.events]
    stepping = attempt.events[names.index(Event.FIRST_STEP) :] if Event.FIRST_STEP in names else ()
    spans.paint(Heading.RESTART, begin_us, stepping[0][0] if stepping else until_us)
    for at_us, event in attempt.events:
        spans.paint(Heading.CHECKPOINT, max(begin_us, at_us - _micro(event.get("stall_s", 0.0))), at_us)
    for (from_us, before), (to_us, after) in pairwise(stepping):
        _paint_steps(spans, (from_us, before["step"]), (to_us, after["step"]), limit)
    if stepping:
        last_us, last = stepping[-1]
        _paint_steps(spans, (last_us, last["step"]), (until_us, last["step"] + 1), limit)
    waits = [(at_us, _micro(event["data_s"])) for at_us, event in stepping if "data_s" in event]
    for (from_us, before_us), (to_us, after_us) in pairwise(waits):
        spans.paint(Heading.DATA, from_us, min(to_us, from_us + after_us - before_us))


def _paint_steps(spans: "_Spans", begin: tuple[int, int], end: tuple[int, int], limit: float) -> None:
    """Work from one (time in us, step) to another, of which the steps up to `limit` count."""
    (begin_us, first), (end_us, last) = begin, end
    cut_us = end_us if last <= limit else begin_us
    if first < limit < last:
        cut_us = begin_us + (end_us - begin_us) * (int(limit) - first) // (last - first)
    spans.paint(Heading.PRODUCTIVE, begin_us, cut_us)
    spans.paint(Heading.REPLAYED, cut_us, end_us)


class _Spans:
    """Claims on the time from `begin_us` to `end_us`; of several on one moment the highest heading wins."""

    def __init__(self, begin_us: int, end_us: int) -> None:
        self._begin_us, self._end_us = begin_us, end_us
        self._edges: list[tuple[int, Heading, int]] = []

    def paint(self, heading: Heading, begin_us: int, end_us: int) -> None:
        begin_us, end_us = max(begin_us, self._begin_us), min(end_us, self._end_us)
        if begin_us < end_us:
            self._edges += [(begin_us, heading, 1), (end_us, heading, -1)]

    def sums(self) -> dict[Heading, int]:
        """Microseconds of every heading."""
        sums = dict.fromkeys(Heading, 0)
        claims = dict.fromkeys(Heading, 0) | {Heading.STOPPED: 1}
        at_us = self._begin_us
        for edge_us, heading, change in sorted(self._edges):
            sums[max(held for held, count in claims.items() if count)] += edge_us - at_us
            claims[heading] += change
            at_us = edge_us
        sums[Heading.STOPPED] += self._end_us - at_us
        return sums
