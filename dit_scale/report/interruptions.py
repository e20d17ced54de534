"""How often a run was interrupted, and why, from its journals alone. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dit_scale.journal import Entry, Event
from dit_scale.report.spans import MICRO, AttemptSpan, RoundSpan, attempts_of, committed_step, rounds_of


@dataclass(frozen=True)
class Interruption:
    """The end of a round or an attempt that was not the end of the run."""

    at_s: float
    """Seconds since 1970; the time of the last entry if the end was not recorded."""
    reason: str
    """The reason that supervisors recorded for a round; otherwise `rollback`, `stopped` or `gone`."""
    node: str
    """The node that failed; empty if unknown."""
    rank: int | None
    step: int | None
    """Steps taken by then, as far as known; None before the first step."""
    lost_steps: int
    """Steps that have to be taken again."""
    text: str


def interruptions(journal: Sequence[Entry], supervisors: Mapping[str, Sequence[Entry]]) -> list[Interruption]:
    """Return the interruptions that the journals record, by time."""
    attempts, rounds = attempts_of(journal), rounds_of(supervisors)
    by_round: dict[int, list[AttemptSpan]] = {span.number: [] for span in rounds}
    found: list[Interruption] = []
    for attempt in attempts:
        started = [span for span in rounds if span.start_us <= attempt.start_us]
        if started and (started[-1].end_us is None or attempt.start_us <= started[-1].end_us):
            by_round[started[-1].number].append(attempt)
        elif attempt.last_entry["event"] == Event.DONE:
            continue  # it reached the last step; the run continues because `steps` was raised
        elif attempt is not attempts[-1] or attempt.last_entry["event"] in (Event.WAITED, Event.ROLLBACK):
            found.append(_of_attempt(attempt, attempts))
    for span in rounds:
        of_span = by_round[span.number]
        found += [_of_attempt(attempt, attempts) for attempt in of_span[:-1]]
        last = of_span[-1] if of_span else None
        if span.ending and span.ending["reason"] != "done":
            found.append(_of_round(span, last, attempts))
        elif not span.ending and span is not rounds[-1]:
            found.append(_of_unrecorded_end(span, last, attempts))
    return sorted(found, key=lambda interruption: interruption.at_s)


def _of_attempt(attempt: AttemptSpan, attempts: Sequence[AttemptSpan]) -> Interruption:
    """Describe the end of an attempt that no supervisor recorded."""
    reason, text = {
        Event.ROLLBACK: ("rollback", "steps failed; rolled back to continue without their samples"),
        Event.WAITED: ("stopped", "saved and stopped on request"),
    }.get(attempt.last_entry["event"], ("gone", "exited without recording a reason"))
    return Interruption(
        at_s=attempt.last_entry_us / MICRO,
        reason=reason,
        node="",
        rank=None,
        step=attempt.last_step,
        lost_steps=_lost_steps(attempt, attempts, attempt.last_step),
        text=text,
    )


def _of_round(span: RoundSpan, attempt: AttemptSpan | None, attempts: Sequence[AttemptSpan]) -> Interruption:
    ending = span.ending
    details = ending.get("details", {})
    steps = [attempt.last_step] if attempt else []
    steps += [details["step"]] if details.get("step") else []
    step = max(steps, default=None)
    return Interruption(
        at_s=(span.end_us or span.start_us) / MICRO,
        reason=ending["reason"],
        node=ending.get("failed_node", ""),
        rank=details.get("rank"),
        step=step,
        lost_steps=_lost_steps(attempt, attempts, step) if attempt and step is not None else 0,
        text=ending.get("text", ""),
    )


def _of_unrecorded_end(
    span: RoundSpan, attempt: AttemptSpan | None, attempts: Sequence[AttemptSpan]
) -> Interruption:
    """Describe the end of a round whose supervisors all exited before it."""
    text = "its supervisors exited without recording a reason"
    if attempt is None:
        at_s = span.last_entry_us / MICRO
        return Interruption(at_s, "gone", node="", rank=None, step=None, lost_steps=0, text=text)
    return replace(_of_attempt(attempt, attempts), text=text)


def _lost_steps(attempt: AttemptSpan, attempts: Sequence[AttemptSpan], step: int) -> int:
    """Return the number of steps of this attempt that the next one took again, or will have to."""
    later = [other.first_step for other in attempts if other.number > attempt.number]
    return max(0, step - (later[0] if later else committed_step(attempts)))
