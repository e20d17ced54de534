"""How the ranks of a node ended, judged by their verdicts, and the milestones of their start."""

import pytest

from dit_scale.elastic.board import Reason
from dit_scale.elastic.node.exits import Exit, Verdict
from dit_scale.elastic.node.group import StartMilestones
from dit_scale.elastic.node.outcomes import judge_exits
from dit_scale.heartbeat import Beat, Phase

DONE = Verdict(rank=0, code=Exit.DONE, step=60)
SAVED = Verdict(rank=1, code=Exit.REQUEUE, step=40)
BROKEN = Verdict(
    rank=0,
    code=Exit.FAILED,
    step=7,
    error="RuntimeError",
    message="Connection closed by peer",
    phase="COMPUTE",
    second_hand=True,
)
FAILED = Verdict(
    rank=1, code=Exit.FAILED, step=7, error="DataError", message="sample 9 is damaged", phase="DATA"
)
MISTAKEN = Verdict(rank=1, code=Exit.DO_NOT_RESTART, step=0, error="ConfigError", message="no", phase="START")


def test_a_node_is_done_or_leaves_only_when_all_its_ranks_have_ended() -> None:
    assert judge_exits({0: DONE, 1: None}, {}) is None
    outcome = judge_exits({0: DONE, 1: DONE}, {})
    assert outcome is not None
    assert (outcome.reason, outcome.text) == (Reason.DONE, "60 steps are taken and saved")
    outcome = judge_exits({0: SAVED, 1: SAVED}, {})
    assert outcome is not None
    assert (outcome.reason, outcome.text) == (Reason.LEAVING, "saved at step 40 and stopped")


def test_a_rank_that_died_without_a_verdict_was_killed() -> None:
    outcome = judge_exits({0: BROKEN, 1: None}, {1: Beat(4711, Phase.COMPUTE, 7, 0.0)})
    assert outcome is not None
    assert outcome.first_hand
    assert (outcome.reason, outcome.text) == (
        Reason.FAILED,
        "rank 1 (process 4711) was killed in phase COMPUTE after step 7",
    )
    assert outcome.details == {"rank": 1, "step": 7, "section": "COMPUTE"}


def test_an_error_with_a_cause_counts_more_than_one_without() -> None:
    outcome = judge_exits({0: BROKEN, 1: FAILED}, {})
    assert outcome is not None
    assert outcome.first_hand
    assert outcome.text == "rank 1: DataError: sample 9 is damaged"
    outcome = judge_exits({0: BROKEN, 1: None}, {})
    assert outcome is not None
    assert not outcome.first_hand
    assert outcome.details == {"rank": 0, "step": 7, "section": "COMPUTE"}


def test_a_mistake_counts_more_than_a_failure() -> None:
    outcome = judge_exits({0: BROKEN, 1: MISTAKEN}, {0: Beat(4711, Phase.COMPUTE, 7, 0.0)})
    assert outcome is not None
    assert (outcome.reason, outcome.text) == (Reason.MISTAKE, "rank 1: ConfigError: no")


@pytest.mark.parametrize("first_step", [0, 40])
def test_each_milestone_is_recorded_once_when_all_ranks_have_reached_it(first_step: int) -> None:
    events: list[tuple[str, int]] = []
    milestones = StartMilestones(3, 2, lambda event, *, round, step: events.append((event, step)))

    def note(*ranks: tuple[Phase, int]) -> list[str]:
        milestones.note({rank: Beat(1, phase, step, 0.0) for rank, (phase, step) in enumerate(ranks)})
        return [event for event, _ in events]

    assert note((Phase.START, 0)) == []
    assert note((Phase.START, 0), (Phase.RESTORE, 0)) == ["first_beat"]
    assert note((Phase.RESTORE, 0), (Phase.RESTORED, 0)) == ["first_beat", "engine_ready"]
    expected = ["first_beat", "engine_ready", "restored"]
    assert note((Phase.DATA, first_step), (Phase.DATA, first_step)) == expected
    assert note((Phase.AGREE, first_step), (Phase.DATA, first_step + 1)) == expected
    expected.append("first_step")
    assert note((Phase.DATA, first_step + 1), (Phase.LOG, first_step + 1)) == expected
    assert note((Phase.DATA, first_step + 2), (Phase.DATA, first_step + 2)) == expected
    assert events[-1] == ("first_step", first_step + 1)
