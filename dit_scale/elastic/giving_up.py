"""When a run gives up, and what its last message says: only what is known about the last failure."""

from collections.abc import Sequence

from dit_scale.elastic.board import FRUITLESS, Ending, Round
from dit_scale.heartbeat import Phase

IN_A_STEP = (Phase.DATA, Phase.COMPUTE, Phase.AGREE)
"""Phases in which the samples of a step may be the cause of a failure."""
ACTIVITIES = {
    Phase.START: "while starting",
    Phase.RESTORE: "while finding or reading a checkpoint",
    Phase.RESTORED: "while waiting for other ranks to read a checkpoint",
    Phase.DATA: "while waiting for data",
    Phase.COMPUTE: "while computing a step",
    Phase.AGREE: "while waiting for the vote of all ranks",
    Phase.LOG: "while logging",
    Phase.SAVE: "while saving",
    Phase.WAIT_SAVE: "while saving",
    Phase.EVALUATE: "while evaluating the weights",
}
"""What a rank was doing, by the phase of its last heartbeat."""


def fruitless_after(round_: Round, ending: Ending) -> int:
    """Consecutive rounds, up to this one, that failed without a newer checkpoint."""
    if ending.committed_step > round_.committed_step:
        return 0
    return round_.fruitless + (ending.reason in FRUITLESS)


def failed_step(ending: Ending) -> int | None:
    """Number of steps taken before the one that failed; None if it failed outside of steps or is unknown."""
    step: int | None = ending.details.get("step")
    return step if _phase(ending) in IN_A_STEP else None


def why(failures: int, committed_step: int, ending: Ending, sample_ids: Sequence[int]) -> str:
    """Return the last message of a run that gives up.

    `ending` is the last failure; `committed_step` is -1 if there is no checkpoint.
    """
    newer = f"a checkpoint newer than step {committed_step}" if committed_step >= 0 else "a first checkpoint"
    last = [f"The last failure was on node {ending.node}"]
    rank, phase, step = ending.details.get("rank"), _phase(ending), ending.details.get("step")
    if rank is not None:
        last.append(f"rank {rank}")
    if phase is not None:
        after = f" after step {step}" if step else ""
        last.append(ACTIVITIES[phase] + after)
    samples = ""
    if sample_ids:
        samples = f" Samples of that step: {', '.join(map(str, sample_ids))}."
    return (
        f"giving up after {failures} consecutive failures without {newer}. {', '.join(last)}: "
        f"{ending.text.rstrip('.')}.{samples} Fix the cause, then run the same command again"
    )


def _phase(ending: Ending) -> Phase | None:
    name = str(ending.details.get("section"))
    return Phase[name] if name in Phase.__members__ else None
