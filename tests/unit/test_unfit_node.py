"""A node that is unfit or wanted back stays out of the next round, and no other node waits for it."""

from pathlib import Path

from dit_scale.elastic.board import Ending, Joined, Reason
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.node.outcomes import GroupOutcome
from dit_scale.elastic.policy import Policy
from tests.support.nodes.members import member_of
from tests.support.nodes.supervisors import Cluster, Node

POLICY = Policy(min_nodes=2, max_nodes=3)


def test_a_node_that_is_unfit_at_its_start_does_not_join(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    node = Node(cluster, "a", policy=POLICY, problems=lambda: ["no room"])
    cluster.run(node)
    assert node.code == Exit.FAILED
    assert cluster.board.joined(1).nodes == []


def test_a_node_that_becomes_unfit_stays_out_of_the_next_round(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    problems: list[str] = []
    a, b, c = _take_part(cluster, problems)
    assert [node for node, _ in cluster.members(1)] == ["a", "b", "c"]
    problems.append("GPU 3 has fallen off the bus")
    c.outcome = GroupOutcome(Reason.FAILED, "rank 2 was killed")
    cluster.run(a, b, c, seconds=2 * POLICY.settle_s)
    assert c.code == Exit.FAILED
    assert [node for node, _ in cluster.members(2)] == ["a", "b"]
    assert a.round == b.round == 2


def test_after_a_save_no_node_waits_for_one_that_has_become_unfit(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    problems: list[str] = []
    a, b, c = _take_part(cluster, problems)
    problems.append("GPU 3 has fallen off the bus")
    cluster.board.end(Ending(1, Reason.GROWING, "a", "more nodes are waiting to join"))
    _leave(cluster, a, b, c)
    assert c.code == Exit.FAILED
    assert cluster.members(2) == [("a", 0), ("b", 0)]


def test_no_node_waits_for_two_that_are_wanted_back_together(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    policy = Policy(min_nodes=1, max_nodes=3)
    a, b, c = (Node(cluster, name, policy=policy) for name in "abc")
    cluster.run(a, b, c)
    b.is_wanted_back = c.is_wanted_back = True
    cluster.run(a, b, c)
    _leave(cluster, a, b, c)
    assert (b.code, c.code) == (Exit.REQUEUE, Exit.REQUEUE)
    assert cluster.members(2) == [("a", 0)]


def test_a_node_that_rejoins_is_expected_again(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    member = member_of("a")
    cluster.board.withdraw(2, member)
    assert cluster.board.joined(2) == Joined(0, [], frozenset({"a"}))
    cluster.board.join(2, member)
    assert cluster.board.joined(2) == Joined(0, ["a"], frozenset())


def _take_part(cluster: Cluster, problems: list[str]) -> list[Node]:
    """Start three nodes and their first round; `problems` are those of the last node."""
    nodes = [Node(cluster, name, policy=POLICY) for name in "ab"]
    nodes.append(Node(cluster, "c", policy=POLICY, problems=lambda: problems))
    cluster.run(*nodes)
    return nodes


def _leave(cluster: Cluster, *nodes: Node) -> None:
    """Let all ranks save and exit, some time after their round has ended."""
    cluster.run(*nodes)
    for node in nodes:
        node.outcome = GroupOutcome(Reason.LEAVING, "saved at step 7 and stopped")
    cluster.run(*nodes)
