"""What a person is told when a run gives up: how often it failed, where, and with which samples, if any."""

from collections.abc import Sequence

from dit_scale.elastic.board import Ending
from dit_scale.heartbeat import Phase

IN_A_STEP = (Phase.DATA, Phase.COMPUTE, Phase.AGREE)
DOING = {
    Phase.START: "while it started",
    Phase.RESTORE: "while it looked for a checkpoint or read one",
    Phase.RESTORED: "while it waited for the others to read a checkpoint",
    Phase.LOG: "as it logged step {step}",
    Phase.SAVE: "while it saved step {step}",
    Phase.WAIT_SAVE: "while it saved step {step}",
    **dict.fromkeys(IN_A_STEP, "after step {step}"),
}
"""What a rank was doing, by the section of its last beat."""


def failed_step(ending: Ending) -> int | None:
    """Steps taken before the one that failed; None where samples had no part in it, or nobody knows."""
    step: int | None = ending.details.get("step")
    return step if _section(ending) in IN_A_STEP else None


def why(failures: int, committed_step: int, ending: Ending, sample_ids: Sequence[int]) -> str:
    """One paragraph; `ending` is the last failure, `committed_step` is -1 where there is no checkpoint."""
    newer = f"without a checkpoint newer than step {committed_step}"
    if committed_step < 0:
        newer = "without a first checkpoint"
    rank, section = ending.details.get("rank"), _section(ending)
    where = f"on {ending.node}" if rank is None else f"of rank {rank} on {ending.node}"
    if section is not None:
        where += " " + DOING[section].format(step=ending.details.get("step"))
    samples = ""
    if sample_ids:
        samples = f" The samples of the step that it was in: {', '.join(map(str, sample_ids))}."
    return (
        f"{failures} failures in a row {newer}: no further try. The last one was {where}: "
        f"{ending.text.rstrip('.')}.{samples} Mend the cause, then start the same command again"
    )


def _section(ending: Ending) -> Phase | None:
    name = str(ending.details.get("section"))
    return Phase[name] if name in Phase.__members__ else None
