"""A job that its scheduler restarts supersedes what is left running of its earlier start."""

from pathlib import Path

import pytest

from dit_scale.elastic.board import Ending, Reason, Round
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.policy import Policy
from tests.support.nodes.members import member_of
from tests.support.nodes.supervisors import TWO, Cluster, Node

START = 7
"""A start of the job, and a later one; the numbers need not be consecutive."""
LATER = 9


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def leave_by(cluster: Cluster, node: str, start: int = START) -> None:
    """End round 1 of nodes a and b because the scheduler wanted one of them back."""
    members = tuple(member_of(name, boot="before", start=start) for name in "ab")
    cluster.board.seal(Round(1, members, -1))
    cluster.board.end(Ending(1, Reason.LEAVING, node, "the scheduler wants the node back"))


def test_a_later_start_ends_the_round_and_the_earlier_supervisors_exit(cluster: Cluster) -> None:
    a, b = Node(cluster, "a", START), Node(cluster, "b", START)
    cluster.run(a, b)
    assert a.round == b.round == 1
    later = Node(cluster, "b", LATER), Node(cluster, "c", LATER)
    cluster.run(*later, a, b)  # much shorter than a lease
    ending = cluster.board.ending(1)
    assert ending is not None
    assert (ending.reason, ending.text) == (Reason.LOST, "the job was restarted")
    assert a.code == b.code == Exit.DO_NOT_RESTART
    assert a.round == b.round == 0
    assert cluster.members(2) == [("b", LATER), ("c", LATER)]
    assert [node.round for node in later] == [2, 2]


def test_a_waiting_node_does_not_become_a_member_in_a_round_of_a_later_start(cluster: Cluster) -> None:
    a = Node(cluster, "a", START)
    cluster.run(a)
    later = Node(cluster, "b", LATER), Node(cluster, "c", LATER)
    cluster.run(*later)  # `a` is stopped meanwhile; it would be the first member
    assert cluster.members(1) == [("b", LATER), ("c", LATER)]
    cluster.run(a, *later)
    assert a.code == Exit.DO_NOT_RESTART
    assert [node.round for node in later] == [1, 1]


def test_a_waiting_node_exits_as_soon_as_a_node_of_a_later_start_joins(
    cluster: Cluster,
) -> None:
    a = Node(cluster, "a", START)
    cluster.run(a)
    cluster.run(a, Node(cluster, "b", LATER))
    assert a.code == Exit.DO_NOT_RESTART
    assert cluster.members(1) == []
    assert cluster.board.joined(1).nodes == ["b"]


def test_a_round_that_the_earlier_start_sealed_first_is_ended(cluster: Cluster) -> None:
    b, c = Node(cluster, "b", LATER), Node(cluster, "c", LATER)
    cluster.run(b)
    member = member_of("b", boot="before", start=START)
    cluster.board.seal(Round(1, (member,), -1))
    cluster.run(b)
    assert b.round == 0
    ending = cluster.board.ending(1)
    assert ending is not None
    assert ending.reason == Reason.LOST
    cluster.run(b, c)
    assert cluster.members(2) == [("b", LATER), ("c", LATER)]


def test_a_late_node_of_an_earlier_start_exits_immediately(cluster: Cluster) -> None:
    b, c = Node(cluster, "b", LATER), Node(cluster, "c", LATER)
    cluster.run(b, c)
    a = Node(cluster, "a", START)
    cluster.run(a, b, c)
    assert a.code == Exit.DO_NOT_RESTART
    assert cluster.board.ending(1) is None
    assert cluster.board.joined(2).nodes == []


def test_a_supervisor_started_by_hand_continues_the_newest_start(cluster: Cluster) -> None:
    leave_by(cluster, "a", LATER)
    member = member_of("a", boot="before", start=LATER + 1)
    cluster.board.join(2, member)  # a later start that got no further
    a, b = Node(cluster, "a", 0), Node(cluster, "b", 0)
    cluster.run(a, b)
    assert cluster.members(2) == [("a", LATER + 1), ("b", LATER + 1)]
    assert [a.round, b.round] == [2, 2]


def test_a_restarted_job_also_waits_for_the_node_that_had_left(cluster: Cluster) -> None:
    leave_by(cluster, "b")
    policy = Policy(min_nodes=1, max_nodes=2)
    a, b = Node(cluster, "a", LATER, policy), Node(cluster, "b", LATER, policy)
    cluster.run(a, seconds=policy.settle_s - 1)
    assert cluster.members(2) == []
    cluster.run(a, b)
    assert cluster.members(2) == [("a", LATER), ("b", LATER)]


def test_a_restarted_job_on_other_nodes_does_not_wait_for_long(cluster: Cluster) -> None:
    leave_by(cluster, "b")
    c = Node(cluster, "c", LATER, Policy(min_nodes=1, max_nodes=2))
    cluster.run(c, seconds=TWO.settle_s + TWO.patience_s + 1)
    assert cluster.members(2) == [("c", LATER)]
