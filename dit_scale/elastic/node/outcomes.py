"""How the ranks of a node ended, according to their verdicts and to which of them died without one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_scale.elastic.board import Reason
from dit_scale.elastic.node.exits import Exit, Verdict
from dit_scale.heartbeat import Beat, where


@dataclass(frozen=True)
class GroupOutcome:
    """How ranks ended, or that they make no progress."""

    reason: Reason
    text: str
    details: dict[str, Any] = field(default_factory=dict)
    first_hand: bool = True
    """False when the cause may be a rank of another node."""
    node: str = ""
    """Node on which it happened; empty for this one."""


def judge_exits(verdicts: Mapping[int, Verdict | None], killed: Mapping[int, Beat]) -> GroupOutcome | None:
    """Return how all ranks ended, or the failure of one; None while ranks are running and none has failed.

    `verdicts` has an entry for every rank of the node. `killed` has the last heartbeats of the ranks that
    died without a verdict.
    """
    written = [verdict for verdict in verdicts.values() if verdict is not None]
    if mistakes := [verdict for verdict in written if verdict.code == Exit.DO_NOT_RESTART]:
        return _failed(Reason.MISTAKE, mistakes[:1])
    if killed:
        return _killed(killed)
    failed = [verdict for verdict in written if verdict.code not in (Exit.DONE, Exit.REQUEUE)]
    if failed:
        return _failed(Reason.FAILED, [one for one in failed if not one.second_hand] or failed[:1])
    if len(written) < len(verdicts):
        return None
    if all(verdict.code == Exit.DONE for verdict in written):
        return GroupOutcome(Reason.DONE, f"{written[0].step} steps are taken and saved")
    return GroupOutcome(Reason.LEAVING, f"saved at step {written[0].step} and stopped")


def _killed(killed: Mapping[int, Beat]) -> GroupOutcome:
    texts = [
        f"rank {rank} (process {beat.pid}) was killed {where(beat.phase, beat.step)}"
        for rank, beat in killed.items()
    ]
    rank, beat = next(iter(killed.items()))
    details = {"rank": rank, "step": beat.step, "section": beat.phase.name}
    return GroupOutcome(Reason.FAILED, "; ".join(texts), details)


def _failed(reason: Reason, verdicts: Sequence[Verdict]) -> GroupOutcome:
    texts = [f"rank {verdict.rank}: {verdict.error}: {verdict.message}" for verdict in verdicts]
    first = verdicts[0]
    details = {"rank": first.rank, "step": first.step, "section": first.phase}
    return GroupOutcome(reason, "; ".join(texts), details, first_hand=not first.second_hand)
