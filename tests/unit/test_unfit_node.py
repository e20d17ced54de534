"""A node on which the ranks would fail takes no part, and the others go on without it."""

from pathlib import Path

from dit_scale.elastic.board import Reason
from dit_scale.elastic.exits import Exit
from dit_scale.elastic.group import Outcome
from dit_scale.elastic.supervisor import Policy
from tests.unit.supervisors import Cluster, Node

POLICY = Policy(min_nodes=2, max_nodes=3)


def test_a_node_that_is_unfit_at_its_start_does_not_join(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    node = Node(cluster, "a", policy=POLICY, problems=lambda: ["no room"])
    cluster.run(node)
    assert node.code == Exit.FAILED
    assert cluster.board.joined(1).nodes == []


def test_a_node_that_has_become_unfit_is_left_out_of_the_next_round(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    problems: list[str] = []
    a, b = Node(cluster, "a", policy=POLICY), Node(cluster, "b", policy=POLICY)
    c = Node(cluster, "c", policy=POLICY, problems=lambda: problems)
    cluster.run(a, b, c)
    assert [node for node, _ in cluster.members(1)] == ["a", "b", "c"]
    problems.append("GPU 3 has fallen off the bus")
    c.ranks.outcome = Outcome(Reason.FAILED, "rank 2 was killed")
    cluster.run(a, b, c, seconds=2 * POLICY.settle_s)
    assert c.code == Exit.FAILED
    assert [node for node, _ in cluster.members(2)] == ["a", "b"]
    assert a.ranks.round == b.ranks.round == 2
