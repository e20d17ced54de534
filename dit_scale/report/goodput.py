"""Where the wall-clock time of a run went, from its journals alone. No torch.

    <run>/events.jsonl               by rank 0: starts, first steps, log points, saves
    <run>/supervisors/<node>.jsonl   by the supervisor of a node: rounds, failures, endings

Every moment between the first entry and the last belongs to exactly one heading, so the ledger sums to the
wall-clock time whatever the journals contain.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from dit_scale.journal import Entry, Event
from dit_scale.ledger import Heading, Ledger
from dit_scale.report.spans import (
    MICRO,
    AttemptSpan,
    RoundSpan,
    attempts_of,
    committed_step,
    microseconds,
    rounds_of,
)

MEASURED = (
    Heading.STOPPED,
    Heading.WAITING,
    Heading.RESTART,
    Heading.STARTUP,
    Heading.REPLAYED,
    Heading.PRODUCTIVE,
    Heading.DATA,
    Heading.CHECKPOINT,
    Heading.EVALUATION,
    Heading.RESTORE,
    Heading.DETECT,
)
"""The headings that journals can tell apart. If two claim the same moment, the later one here gets it.

DATA: other ranks that wait for data count as productive, because every rank waits for the slowest.
DETECT starts at the last heartbeat of the rank that stopped; if that is unknown, the time counts as steps."""


def ledger(
    journal: Iterable[Entry],
    supervisors: Mapping[str, Sequence[Entry]],
    until_s: float | None = None,
    alive: bool = False,
) -> Ledger:
    """Return the ledger of a run up to its last entry, or up to `until_s` (seconds since 1970).

    `alive`: the last attempt is still training at that time, so none of its steps are lost.
    """
    attempts, rounds = attempts_of(journal), rounds_of(supervisors)
    joins = [entry for entries in supervisors.values() for entry in entries if entry["event"] == Event.JOINED]
    times_us = [at_us for attempt in attempts for at_us, _ in attempt.entries]
    times_us += [
        us for span in rounds for us in (span.start_us, span.end_us, span.exited_us) if us is not None
    ]
    times_us += [microseconds(entry["time_s"]) for entry in joins]
    begin_us = min(times_us, default=microseconds(until_s or 0.0))
    end_us = max(times_us, default=begin_us) if until_s is None else max(begin_us, microseconds(until_s))
    claims = _Claims(begin_us, end_us)
    _claim_rounds(claims, attempts, rounds, joins)
    claims.add(Heading.STARTUP, *_startup(attempts, rounds, end_us))
    for attempt, last_kept in zip(attempts, _kept_steps(attempts, alive), strict=True):
        is_training = alive and attempt is attempts[-1]
        until_us = end_us if is_training else _trained_until(attempt, attempts, rounds)
        _claim_attempt(claims, attempt, last_kept, until_us)
    return Ledger(begin_us, end_us, claims.sums(), units_per_s=MICRO)


def _claim_rounds(
    claims: "_Claims", attempts: Sequence[AttemptSpan], rounds: Sequence[RoundSpan], joins: Sequence[Entry]
) -> None:
    """Claim waits for nodes, restarts and detection."""
    for before, span, after in zip((None, *rounds), rounds, (*rounds[1:], None), strict=False):
        claims.add(Heading.WAITING, _waiting_since(before, span, joins), span.start_us)
        closed_us = _last_sign(span, attempts, after) if after else claims.end_us
        claims.add(Heading.RESTART, span.start_us, closed_us if span.exited_us is None else span.exited_us)
        if span.end_us is not None:
            claims.add(Heading.DETECT, max(span.start_us, span.end_us - span.silent_us), span.end_us)
    if rounds and rounds[-1].restarts and rounds[-1].exited_us is not None:
        claims.add(Heading.WAITING, rounds[-1].exited_us, claims.end_us)
    newest = rounds[-1].number if rounds else 0
    for entry in joins:
        if entry["round"] > newest:
            claims.add(Heading.WAITING, microseconds(entry["time_s"]), claims.end_us)


def _last_sign(span: RoundSpan, attempts: Sequence[AttemptSpan], after: RoundSpan) -> int:
    """Return the time of the last entry of a round whose end was not recorded."""
    of_span = [a.last_entry_us for a in attempts if span.start_us <= a.start_us < after.start_us]
    return max(span.last_entry_us, *of_span, 0)


def _waiting_since(before: RoundSpan | None, span: RoundSpan, joins: Iterable[Entry]) -> int:
    """Return when supervisors started to wait for this round."""
    exited_us = before.exited_us or before.last_entry_us if before else 0
    if before is not None and before.ending and before.restarts:
        return exited_us
    joined_us = [microseconds(entry["time_s"]) for entry in joins if entry["round"] == span.number]
    return max(exited_us, min(joined_us, default=span.start_us))


def _kept_steps(attempts: Sequence[AttemptSpan], alive: bool) -> list[float]:
    """Return the last step of each attempt that is not lost: kept by later attempts, or committed."""
    limit = float("inf") if alive else float(committed_step(attempts))
    limits: list[float] = []
    for attempt in reversed(attempts):
        limits.append(limit)
        limit = min(limit, attempt.first_step)
    return limits[::-1]


def _startup(attempts: Sequence[AttemptSpan], rounds: Sequence[RoundSpan], end_us: int) -> tuple[int, int]:
    """Return the span of the first start: up to its first step, or to its end without one."""
    entries = attempts[0].entries if attempts else ()
    stepped_us = [at_us for at_us, entry in entries if entry["event"] == Event.FIRST_STEP]
    if rounds and not (entries and entries[0][0] < rounds[0].start_us):
        first, *later = rounds
        over_us = first.end_us or (_last_sign(first, attempts, later[0]) if later else end_us)
        return first.start_us, min([*stepped_us, over_us])
    return (entries[0][0], (stepped_us or [entries[-1][0]])[0]) if entries else (end_us, end_us)


def _trained_until(attempt: AttemptSpan, attempts: Sequence[AttemptSpan], rounds: Sequence[RoundSpan]) -> int:
    """Return when an attempt stopped training: at its last entry, or when its round failed."""
    last_us = attempt.last_entry_us
    if attempt.has_exited:
        return last_us
    for span in reversed(rounds):
        if span.start_us <= attempt.start_us:
            later = [a for a in attempts if a.number > attempt.number and a.start_us <= (span.end_us or 0)]
            if later or span.end_us is None or attempt.start_us > span.end_us:
                return last_us
            return max(last_us, span.end_us - span.silent_us)
    return last_us


def _claim_attempt(claims: "_Claims", attempt: AttemptSpan, last_kept: float, until_us: int) -> None:
    start_us, start = attempt.entries[0]
    claims.add(Heading.RESTORE, start_us - microseconds(start.get("restore_s", 0.0)), start_us)
    names = [entry["event"] for _, entry in attempt.entries]
    stepping = attempt.entries[names.index(Event.FIRST_STEP) :] if Event.FIRST_STEP in names else ()
    claims.add(Heading.RESTART, start_us, stepping[0][0] if stepping else until_us)
    for at_us, entry in attempt.entries:
        stall_us = microseconds(entry.get("stall_s", 0.0))
        claims.add(Heading.CHECKPOINT, max(start_us, at_us - stall_us), at_us)
        if entry["event"] == Event.EVALUATION:
            took_us = microseconds(entry.get("seconds", 0.0))
            claims.add(Heading.EVALUATION, max(start_us, at_us - took_us), at_us)
    for (from_us, before), (to_us, after) in pairwise(stepping):
        _claim_steps(claims, (from_us, before["step"]), (to_us, after["step"]), last_kept)
    if stepping:
        last_us, last = stepping[-1]
        _claim_steps(claims, (last_us, last["step"]), (until_us, last["step"] + 1), last_kept)
    waits = [(at_us, microseconds(entry["data_s"])) for at_us, entry in stepping if "data_s" in entry]
    for (from_us, before_us), (to_us, after_us) in pairwise(waits):
        claims.add(Heading.DATA, from_us, min(to_us, from_us + after_us - before_us))


def _claim_steps(claims: "_Claims", begin: tuple[int, int], end: tuple[int, int], last_kept: float) -> None:
    """Claim training between two (time in us, step); steps up to `last_kept` are productive."""
    (begin_us, first), (end_us, last) = begin, end
    cut_us = end_us if last <= last_kept else begin_us
    if first < last_kept < last:
        cut_us = begin_us + (end_us - begin_us) * (int(last_kept) - first) // (last - first)
    claims.add(Heading.PRODUCTIVE, begin_us, cut_us)
    claims.add(Heading.REPLAYED, cut_us, end_us)


class _Claims:
    """Claims on the time from `begin_us` to `end_us`; where several overlap, the last of MEASURED wins."""

    def __init__(self, begin_us: int, end_us: int) -> None:
        self.begin_us, self.end_us = begin_us, end_us
        self._edges: list[tuple[int, int, int]] = []
        """(time, place in MEASURED, +1 or -1)."""

    def add(self, heading: Heading, begin_us: int, end_us: int) -> None:
        begin_us, end_us = max(begin_us, self.begin_us), min(end_us, self.end_us)
        if begin_us < end_us:
            priority = MEASURED.index(heading)
            self._edges += [(begin_us, priority, 1), (end_us, priority, -1)]

    def sums(self) -> dict[Heading, int]:
        """Return the microseconds by heading; unclaimed time is STOPPED."""
        sums = [0] * len(MEASURED)
        counts = [1] + [0] * (len(MEASURED) - 1)
        at_us = self.begin_us
        for edge_us, priority, change in sorted(self._edges):
            sums[max(held for held, count in enumerate(counts) if count)] += edge_us - at_us
            counts[priority] += change
            at_us = edge_us
        sums[0] += self.end_us - at_us
        return dict(zip(MEASURED, sums, strict=True))
