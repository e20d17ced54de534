"""Attempts and rounds of a run on a common time line, from its journals. No torch.

Entries of one process are ordered by the monotonic clock of its node. The wall clock is used only where a
process or a round starts. For a round, the journal of the node with rank 0 counts, or another one if that
node did not see the end. A wall clock that jumps therefore shifts the time between two processes, never the
time within one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dit_scale.journal import Entry, Event

MICRO = 1_000_000
"""Times are whole microseconds, so sums are exact."""
_EXITS = (Event.DONE, Event.WAITED, Event.ROLLBACK)
"""The last entries of an attempt that exited on its own."""


@dataclass(frozen=True)
class AttemptSpan:
    """The journal entries of one attempt."""

    number: int
    entries: tuple[tuple[int, Entry], ...]
    """(time in us, entry), ascending."""

    @property
    def start_us(self) -> int:
        return self.entries[0][0]

    @property
    def last_entry_us(self) -> int:
        return self.entries[-1][0]

    @property
    def last_entry(self) -> Entry:
        """The last entry that is no alarm: closing the files can still raise one."""
        relevant = (entry for _, entry in reversed(self.entries) if entry["event"] != Event.ALARM)
        return next(relevant, self.entries[-1][1])

    @property
    def has_exited(self) -> bool:
        """Whether the attempt exited on its own."""
        return self.last_entry["event"] in _EXITS

    @property
    def first_step(self) -> int:
        """Steps taken before this attempt."""
        return int(self.entries[0][1]["step"])

    @property
    def last_step(self) -> int:
        """Steps taken by its last entry."""
        return max(int(entry["step"]) for _, entry in self.entries)


@dataclass(frozen=True)
class RoundSpan:
    """A round as recorded by one node."""

    number: int
    start_us: int
    end_us: int | None
    """When its end was recorded; None while it runs."""
    silent_us: int
    """How long the rank that stopped had sent no heartbeat by then; 0 if unknown."""
    exited_us: int | None
    """When its ranks had exited; None while they may still run."""
    last_entry_us: int
    ending: Entry
    """The entry that says why it ended; empty while it runs."""

    @property
    def restarts(self) -> bool:
        """Whether another round follows automatically, without a scheduler or manual intervention."""
        return self.ending.get("reason") not in ("done", "leaving", "mistake")


def attempts_of(journal: Iterable[Entry]) -> list[AttemptSpan]:
    """Return the attempts in events.jsonl, ascending; none starts before its predecessor."""
    by_number: dict[int, list[Entry]] = {}
    for entry in journal:
        if {"attempt", "step"} <= entry.keys():  # else damaged: every entry of a run has both
            by_number.setdefault(int(entry["attempt"]), []).append(entry)
    attempts: list[AttemptSpan] = []
    for number, entries in sorted(by_number.items()):
        earliest_us = attempts[-1].start_us if attempts else 0
        times_us = _times(entries, earliest_us)
        attempts.append(AttemptSpan(number, tuple(zip(times_us, entries, strict=True))))
    return attempts


def rounds_of(supervisors: Mapping[str, Sequence[Entry]]) -> list[RoundSpan]:
    """Return the rounds in the journals of all nodes, ascending, each from the node that saw most of it."""
    by_round: dict[int, dict[str, list[Entry]]] = {}
    for node, entries in supervisors.items():
        for entry in entries:
            if "round" in entry:
                by_round.setdefault(int(entry["round"]), {}).setdefault(node, []).append(entry)
    rounds: list[RoundSpan] = []
    for number, by_node in sorted(by_round.items()):
        started = {node: own for node, entries in by_node.items() if (own := _from_start(entries))}
        if started:
            first_node = next(iter(started.values()))[0]["nodes"][0]
            node = max(started, key=lambda node: (_saw_the_end(started[node]), node == first_node))
            rounds.append(_round(number, started[node], rounds[-1].start_us if rounds else 0))
    return rounds


def is_done(attempts: Sequence[AttemptSpan]) -> bool:
    """Whether the last attempt reached the last step."""
    return bool(attempts) and attempts[-1].last_entry["event"] == Event.DONE


def committed_step(attempts: Sequence[AttemptSpan]) -> int:
    """Return the newest step that the journal reports as committed, or 0."""
    entries = [entry for attempt in attempts for _, entry in attempt.entries]
    names = [entry["name"] for entry in entries if entry["event"] == Event.CHECKPOINT]
    return max((int(name.partition("-")[0]) for name in names), default=0)


def microseconds(seconds: float) -> int:
    """Round seconds to whole microseconds."""
    return round(seconds * MICRO)


def _times(entries: Sequence[Entry], earliest_us: int) -> list[int]:
    """Return the times of the entries of a process in us: by the wall clock, then by elapsed time."""
    at_us = max(earliest_us, microseconds(entries[0]["time_s"]))
    times_us = [at_us]
    for before, entry in pairwise(entries):
        clock = "monotonic_s" if "monotonic_s" in before and "monotonic_s" in entry else "time_s"
        at_us += max(0, microseconds(entry[clock] - before[clock]))
        times_us.append(at_us)
    return times_us


def _from_start(entries: list[Entry]) -> list[Entry]:
    """Return the entries from the start of the round on; none for a node that only waited for it."""
    names = [entry["event"] for entry in entries]
    return entries[names.index(Event.ROUND) :] if Event.ROUND in names else []


def _saw_the_end(entries: Sequence[Entry]) -> bool:
    return any(entry["event"] == Event.ROUND_ENDED for entry in entries)


def _round(number: int, entries: list[Entry], earliest_us: int) -> RoundSpan:
    times_us = dict(zip([entry["event"] for entry in entries], _times(entries, earliest_us), strict=True))
    ending = next((entry for entry in entries if entry["event"] == Event.ROUND_ENDED), {})
    end_us = times_us.get(Event.ROUND_ENDED)
    return RoundSpan(
        number=number,
        start_us=times_us[Event.ROUND],
        end_us=end_us,
        silent_us=microseconds(ending.get("details", {}).get("age_s", 0.0)),
        exited_us=times_us.get(Event.RANKS_GONE, end_us),
        last_entry_us=max(times_us.values()),
        ending=ending,
    )
