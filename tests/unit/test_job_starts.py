"""A job that its scheduler started again takes over from what is left running of its earlier start."""

from pathlib import Path

import pytest

from dit_scale.elastic.board import Ending, Member, Reason, Round
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.supervisor import Policy
from tests.support.nodes.supervisors import TWO, Cluster, Node

START = 7
"""A start, and a later one; they need not follow upon each other."""
LATER = 9


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def leave_by(cluster: Cluster, node: str, start: int = START) -> None:
    """Round 1, of nodes a and b, has ended because one of them was wanted back."""
    members = tuple(Member(name, "before", "", 1, 1, "digest", start) for name in "ab")
    cluster.board.seal(Round(1, members, -1))
    cluster.board.end(Ending(1, Reason.LEAVING, node, "the scheduler wants the node back"))


def test_a_later_start_ends_the_round_and_what_is_left_of_the_earlier_one_leaves(cluster: Cluster) -> None:
    a, b = Node(cluster, "a", START), Node(cluster, "b", START)
    cluster.run(a, b)
    assert a.ranks.round == b.ranks.round == 1
    later = Node(cluster, "b", LATER), Node(cluster, "c", LATER)
    cluster.run(*later, a, b)  # much less than a lease
    ending = cluster.board.ending(1)
    assert ending is not None
    assert (ending.reason, ending.text) == (Reason.LOST, "the job was started again")
    assert a.code == b.code == Exit.DO_NOT_RESTART
    assert a.ranks.round == b.ranks.round == 0
    assert cluster.members(2) == [("b", LATER), ("c", LATER)]
    assert [node.ranks.round for node in later] == [2, 2]


def test_who_waits_for_a_round_is_not_taken_into_one_of_a_later_start(cluster: Cluster) -> None:
    a = Node(cluster, "a", START)
    cluster.run(a)
    later = Node(cluster, "b", LATER), Node(cluster, "c", LATER)
    cluster.run(*later)  # `a` is stopped meanwhile, and has the first name
    assert cluster.members(1) == [("b", LATER), ("c", LATER)]
    cluster.run(a, *later)
    assert a.code == Exit.DO_NOT_RESTART
    assert [node.ranks.round for node in later] == [1, 1]


def test_who_waits_for_a_round_leaves_as_soon_as_somebody_of_a_later_start_waits_too(
    cluster: Cluster,
) -> None:
    a = Node(cluster, "a", START)
    cluster.run(a)
    cluster.run(a, Node(cluster, "b", LATER))
    assert a.code == Exit.DO_NOT_RESTART
    assert cluster.members(1) == []
    assert cluster.board.joined(1).nodes == ["b"]


def test_a_round_that_the_earlier_start_was_quicker_to_begin_is_ended(cluster: Cluster) -> None:
    b, c = Node(cluster, "b", LATER), Node(cluster, "c", LATER)
    cluster.run(b)
    member = Member("b", "before", "", 1, 1, "digest", START)
    cluster.board.seal(Round(1, (member,), -1))
    cluster.run(b)
    assert b.ranks.round == 0
    ending = cluster.board.ending(1)
    assert ending is not None
    assert ending.reason == Reason.LOST
    cluster.run(b, c)
    assert cluster.members(2) == [("b", LATER), ("c", LATER)]


def test_an_earlier_start_that_comes_late_leaves_at_once(cluster: Cluster) -> None:
    b, c = Node(cluster, "b", LATER), Node(cluster, "c", LATER)
    cluster.run(b, c)
    a = Node(cluster, "a", START)
    cluster.run(a, b, c)
    assert a.code == Exit.DO_NOT_RESTART
    assert cluster.board.ending(1) is None
    assert cluster.board.joined(2).nodes == []


def test_who_is_started_by_hand_goes_on_with_what_a_job_left(cluster: Cluster) -> None:
    leave_by(cluster, "a", LATER)
    member = Member("a", "before", "", 1, 1, "digest", LATER + 1)
    cluster.board.join(2, member)  # a later start that came no further
    a, b = Node(cluster, "a", 0), Node(cluster, "b", 0)
    cluster.run(a, b)
    assert cluster.members(2) == [("a", LATER + 1), ("b", LATER + 1)]
    assert [a.ranks.round, b.ranks.round] == [2, 2]


def test_a_job_that_is_started_again_waits_for_the_node_that_left_too(cluster: Cluster) -> None:
    leave_by(cluster, "b")
    policy = Policy(min_nodes=1, max_nodes=2)
    a, b = Node(cluster, "a", LATER, policy), Node(cluster, "b", LATER, policy)
    cluster.run(a, seconds=policy.settle_s - 1)
    assert cluster.members(2) == []
    cluster.run(a, b)
    assert cluster.members(2) == [("a", LATER), ("b", LATER)]


def test_it_does_not_wait_for_long_when_its_nodes_are_others(cluster: Cluster) -> None:
    leave_by(cluster, "b")
    c = Node(cluster, "c", LATER, Policy(min_nodes=1, max_nodes=2))
    cluster.run(c, seconds=TWO.settle_s + TWO.patience_s + 1)
    assert cluster.members(2) == [("c", LATER)]
