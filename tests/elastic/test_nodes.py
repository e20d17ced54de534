"""Nodes that join, leave and are lost: the run continues with the others."""

import signal
from pathlib import Path

import pytest

from dit_scale.checkpoint.attempts import committed
from dit_scale.elastic.node.processes import is_alive
from dit_scale.train.run_folder import root_of
from tests.support.nodes.nodes import Cluster, Node, cluster, config_of
from tests.support.ranks.record import last_step, rows
from tests.support.speed import scaled

pytestmark = pytest.mark.dist

STEPS = 100_000
"""More than any of these runs takes before it is asked to stop."""
GROWING = ("--nodes", "2:3", "--grow-s", "1", "--lease-s", str(scaled(6.0)))


def test_three_nodes_lose_the_first_which_rejoins_and_then_all_leave(tmp_path: Path) -> None:
    config = config_of(tmp_path, STEPS)
    with cluster(config) as nodes:
        a, b, c = (nodes.start(name, *GROWING) for name in "abc")
        nodes.wait_for_ranks(a, 1)
        assert b.events("round")[-1]["nodes"] == ["a", "b", "c"]
        ranks = list(a.ranks().values())
        a.kill()  # the rendezvous of the ranks is lost with it
        _wait_for_members(nodes, b, ["b", "c"])
        assert b.endings()[-1] == c.endings()[-1] == ("lost", "a")
        assert ranks
        assert not any(map(is_alive, ranks)), "ranks outlived their supervisor"

        again = nodes.start("a", *GROWING)
        _wait_for_members(nodes, b, ["a", "b", "c"])
        assert b.endings()[-2:] == [("lost", "a"), ("growing", "b")]

        step = last_step(Path(config.run) / "metrics.jsonl")
        again.process.send_signal(signal.SIGTERM)
        assert again.exit_code() == 75
        for node in (b, c):
            nodes.wait_for_ranks(node, 4)
        assert b.events("round")[-1]["nodes"] == ["b", "c"]
        assert b.endings()[-1] == ("leaving", "a")

        b.process.send_signal(signal.SIGUSR1)
        c.process.send_signal(signal.SIGUSR1)
        assert (b.exit_code(), c.exit_code()) == (75, 75)
    newest = committed(root_of(config))[0].step
    assert newest >= step
    assert [row["step"] for row in rows(config)] == list(range(1, newest + 1))


def test_a_restarted_supervisor_rejoins_immediately(tmp_path: Path) -> None:
    config = config_of(tmp_path, STEPS)
    with cluster(config) as nodes:
        a, b = (nodes.start(name, "--nodes", "2", "--lease-s", "6000") for name in "ab")
        nodes.wait_for_ranks(b, 1)
        b.kill()
        nodes.start("b", "--nodes", "2", "--lease-s", "6000")
        nodes.wait(lambda: len(a.events("ranks_started")) == 2, "round 2")
        assert a.events("round")[-1]["nodes"] == ["a", "b"]
        assert a.endings() == [("lost", "b")]
        assert "its supervisor was restarted" in a.events("round_ended")[0]["text"]


def _wait_for_members(nodes: Cluster, node: Node, names: list[str]) -> None:
    """Wait until a round of these nodes has taken its first step."""

    def is_there() -> bool:
        steps, rounds = node.events("first_step"), node.events("round")
        return bool(steps) and rounds[-1]["nodes"] == names and steps[-1]["round"] == rounds[-1]["round"]

    nodes.wait(is_there, f"round of {names}")
