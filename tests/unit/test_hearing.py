"""Among many nodes only the first members of a round judge, and the others if these do not."""

from dit_scale.elastic.board import Board, Reason, Round
from dit_scale.elastic.hearing import JUDGES, Hearing
from dit_scale.elastic.node.deadlines import Standing
from dit_scale.elastic.node.outcomes import GroupOutcome
from dit_scale.heartbeat import Phase
from tests.support.nodes.members import member_of

NODES = [f"n{number:02d}" for number in range(JUDGES + 2)]
ROUND = Round(1, tuple(member_of(node) for node in NODES), committed_step=5)
BROKEN = GroupOutcome(Reason.FAILED, "Connection closed by peer", first_hand=False)
PATIENCE_S = 5.0


def hearing(board: Board, node: str) -> Hearing:
    return Hearing(board, ROUND, node, PATIENCE_S)


def test_the_first_members_judge_immediately_and_the_others_after_a_while(board: Board) -> None:
    for node in NODES:
        hearing(board, node).report(BROKEN, ())
    assert hearing(board, NODES[JUDGES - 1]).judge(0.0) is not None
    other = hearing(board, NODES[JUDGES])
    assert other.judge(0.0) is None
    assert other.judge(2 * PATIENCE_S - 0.1) is None
    assert other.judge(2 * PATIENCE_S) is not None


def test_a_silent_node_that_the_others_wait_for_is_lost(board: Board) -> None:
    still = Standing(rank=0, pid=10, phase=Phase.COMPUTE, step=7, age_s=9.0, limit_s=8.0)
    for node in NODES[:-1]:
        hearing(board, node).report(None, (still,))
        board.renew_lease(node, 1)
    board.renew_lease(NODES[-1], 1)
    judge = hearing(board, NODES[0])
    assert [judge.judge(at_s) for at_s in (0.0, 1.5)] == [None, None]
    outcome = judge.judge(PATIENCE_S + 0.5)
    assert outcome is not None
    assert (outcome.reason, outcome.node) == (Reason.LOST, NODES[-1])
