"""A round whose supervisors are all gone is ended by a node that waits for it, and no other round is."""

from pathlib import Path

from dit_scale.elastic.board import Board, Ending, Member, Reason, Round
from dit_scale.elastic.node.deadlines import Deadlines
from dit_scale.elastic.node.group import LaunchedGroup
from dit_scale.elastic.supervisor import Dependencies, Policy, Supervisor
from dit_scale.storage import open_storage


def member(node: str) -> Member:
    return Member(node, f"boot of {node}", "127.0.0.1", 1, 1, "digest")


def ending_after(folder: Path, looks: int, living: str = "") -> Ending | None:
    """Of round 1 of nodes a and b, when node c has waited for it that long; one of them may live."""
    now_s, board = 0.0, Board(open_storage(folder))
    board.seal(Round(1, (member("a"), member("b")), -1))
    board.renew_lease("a", 7)
    policy = Policy(1, 2)
    world = Dependencies(lambda: now_s, lambda: -1, lambda: False, print)
    life = Supervisor(member("c"), board, LaunchedGroup([], folder, Deadlines()), policy, world).run()
    for count in range(looks):
        if living:
            board.renew_lease(living, count)
        next(life)
        now_s += policy.lease_s + 1
        if board.ending(1):
            break
    life.close()
    return board.ending(1)


def test_a_round_without_a_living_supervisor_is_ended(tmp_path: Path) -> None:
    ending = ending_after(tmp_path, 3)
    assert ending is not None
    assert (ending.reason, ending.text) == (Reason.LOST, "none of its supervisors gives a sign")


def test_a_round_is_not_ended_at_the_first_look(tmp_path: Path) -> None:
    assert ending_after(tmp_path, 1) is None


def test_one_that_lives_is_enough(tmp_path: Path) -> None:
    for living in ("a", "b"):
        assert ending_after(tmp_path / living, 8, living) is None
