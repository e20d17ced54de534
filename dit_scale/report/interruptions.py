"""How often a run was interrupted, and why: from its journals alone. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dit_scale.journal import Entry, Event
from dit_scale.report.goodput import ENDS, MICRO, AttemptSpan, RoundSpan, attempts_of, rounds_of


@dataclass(frozen=True)
class Interruption:
    """An end of a round, or of an attempt, that was not the end of the run."""

    at_s: float
    """Seconds since 1970; of the last thing heard, where nobody saw the end."""
    reason: str
    """Of a round as its supervisors have it; else `rollback`, `stopped` or `gone`."""
    node: str
    """Empty where it is not known."""
    rank: int | None
    step: int | None
    """Steps taken when it happened, as far as known; None when it had not come to steps."""
    lost_steps: int
    """Of them, how many are taken again."""
    text: str


def interruptions(journal: Sequence[Entry], supervisors: Mapping[str, Sequence[Entry]]) -> list[Interruption]:
    """Every interruption that the journals tell of, in their order; what still runs is none."""
    attempts, rounds = attempts_of(journal), rounds_of(supervisors)
    by_round: dict[int, list[AttemptSpan]] = {span.number: [] for span in rounds}
    found: list[Interruption] = []
    for attempt in attempts:
        begun = [span for span in rounds if span.begin_us <= attempt.begin_us]
        if begun and (begun[-1].seen_us is None or attempt.begin_us <= begun[-1].seen_us):
            by_round[begun[-1].number].append(attempt)
        elif attempt is not attempts[-1] or attempt.last_event["event"] in (Event.WAITED, Event.ROLLBACK):
            found.append(_of_attempt(attempt, attempts))
    for span in rounds:
        of_span = by_round[span.number]
        found += [_of_attempt(attempt, attempts) for attempt in of_span[:-1]]
        if span.ended and span.ended["reason"] != "done":
            found.append(_of_round(span, of_span[-1] if of_span else None, attempts))
        elif not span.ended and span is not rounds[-1]:
            found.append(_unseen(span, of_span[-1] if of_span else None, attempts))
    return sorted(found, key=lambda one: one.at_s)


def _of_attempt(attempt: AttemptSpan, attempts: Sequence[AttemptSpan]) -> Interruption:
    """Of one whose end no supervisor saw."""
    at_us, last = attempt.events[-1][0], attempt.last_event
    reason, text = {
        Event.ROLLBACK: ("rollback", "steps failed; went back, and on without their samples"),
        Event.WAITED: ("stopped", "on request, saved"),
    }.get(last["event"], ("gone", "its process ended without a word"))
    step = attempt.last_step
    return Interruption(at_us / MICRO, reason, "", None, step, _lost(attempt, attempts, step), text)


def _of_round(span: RoundSpan, attempt: AttemptSpan | None, attempts: Sequence[AttemptSpan]) -> Interruption:
    ended: dict[str, Any] = span.ended
    details = ended.get("details", {})
    steps = [attempt.last_step] if attempt else []
    steps += [details["step"]] if details.get("step") else []
    step = max(steps, default=None)
    lost = _lost(attempt, attempts, step) if attempt and step is not None else 0
    at_s = (span.seen_us or span.begin_us) / MICRO
    node, rank = ended.get("failed_node", ""), details.get("rank")
    return Interruption(at_s, ended["reason"], node, rank, step, lost, ended.get("text", ""))


def _unseen(span: RoundSpan, attempt: AttemptSpan | None, attempts: Sequence[AttemptSpan]) -> Interruption:
    """Of a round whose supervisors all went before its end."""
    text = "its supervisors ended without a word"
    if attempt is None:
        return Interruption(span.sign_us / MICRO, "gone", "", None, None, 0, text)
    return replace(_of_attempt(attempt, attempts), text=text)


def _lost(attempt: AttemptSpan, attempts: Sequence[AttemptSpan], step: int) -> int:
    """Steps that the attempts after this one took again, or will have to."""
    later = [other.first_step for other in attempts if other.number > attempt.number]
    return max(0, step - (later[0] if later else committed_step(attempts)))


def committed_step(attempts: Sequence[AttemptSpan]) -> int:
    """The newest step that the journal says is committed; 0 when it tells of none."""
    names = [e["name"] for a in attempts for _, e in a.events if e["event"] == Event.CHECKPOINT]
    return max((int(name.partition("-")[0]) for name in names), default=0)


def is_done(attempts: Sequence[AttemptSpan]) -> bool:
    """Whether the last attempt came to the last step."""
    return bool(attempts) and attempts[-1].last_event["event"] == Event.DONE


def has_left(attempt: AttemptSpan) -> bool:
    """Whether an attempt ended by itself."""
    return attempt.last_event["event"] in ENDS
