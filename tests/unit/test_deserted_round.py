"""A waiting node ends a round once none of its supervisors is running, and not before."""

from pathlib import Path

import pytest

from dit_scale.elastic.board import Board, Ending, Reason, Round
from dit_scale.elastic.local_node import Dependencies
from dit_scale.elastic.policy import Policy
from dit_scale.elastic.supervisor import Supervisor
from dit_scale.storage import open_storage
from tests.support.nodes.members import member_of


def ending_after(folder: Path, looks: int, running: str = "") -> Ending | None:
    """Ending of round 1 of nodes a and b after node c has looked so often; one of them may be running."""
    now_s, board = 0.0, Board(open_storage(folder))
    board.seal(Round(1, (member_of("a"), member_of("b")), -1))
    board.renew_lease("a", 7)
    policy = Policy(1, 2)
    dependencies = Dependencies(
        clock=lambda: now_s,
        committed_step=lambda: -1,
        is_wanted_back=lambda: False,
        start_group=lambda round_, index: pytest.fail("node c is not a member"),
        say=print,
    )
    supervision = Supervisor(member_of("c"), board, policy, dependencies).run()
    for count in range(looks):
        if running:
            board.renew_lease(running, count)
        next(supervision)
        now_s += policy.lease_s + 1
        if board.ending(1):
            break
    supervision.close()
    return board.ending(1)


def test_a_round_without_a_running_supervisor_is_ended(tmp_path: Path) -> None:
    ending = ending_after(tmp_path, 3)
    assert ending is not None
    assert ending.reason == Reason.LOST
    assert ending.text == "all of its supervisors have stopped renewing their leases"


def test_a_round_is_not_ended_at_the_first_look(tmp_path: Path) -> None:
    assert ending_after(tmp_path, 1) is None


def test_one_running_supervisor_is_enough(tmp_path: Path) -> None:
    for running in ("a", "b"):
        assert ending_after(tmp_path / running, 8, running) is None
