"""Ranks that hang without being stopped: detected by their heartbeats, the right one named, stacks kept."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dit_scale.config import TrainConfig
from tests.support.nodes.nodes import Cluster, Node, cluster, config_of
from tests.support.speed import scaled

pytestmark = pytest.mark.dist

STEPS = 100_000
"""More than any of these runs takes."""
DATA_DEADLINE_S = {"stuck_read": scaled(12.0), "frozen_read": scaled(2.0)}
FAULTS = ("stuck_read", "lock", "deaf", "frozen_read")


def test_hanging_ranks_are_named_and_their_stacks_kept(tmp_path: Path) -> None:
    with ExitStack() as stack:
        clusters: dict[str, Cluster] = {}
        closes: dict[str, ExitStack] = {}
        for fault in FAULTS:  # in parallel: most of the time is spent waiting for deadlines
            closes[fault] = stack.enter_context(ExitStack())
            nodes = clusters[fault] = closes[fault].enter_context(cluster(_config(tmp_path, fault)))
            names = "ab" if fault == "lock" else "a"
            for name in names:
                nodes.start(name, "--nodes", str(len(names)), slots=2 // len(names), fault=f"{fault}:1")
        left = dict(clusters)
        while left:
            watching = next(iter(left.values()))
            watching.wait(lambda: any(map(_has_ended, left.values())), f"end of a round of {', '.join(left)}")
            for fault in [fault for fault, nodes in left.items() if _has_ended(nodes)]:
                closes[fault].close()  # before its next round takes time from the others
                del left[fault]
    first_nodes = {fault: nodes.nodes[0] for fault, nodes in clusters.items()}
    ends = {fault: node.events("round_ended")[0] for fault, node in first_nodes.items()}

    assert _blamed(ends["lock"]) == ("hung", "b", 1, "COMPUTE")
    assert ends["deaf"]["reason"] == "hung"  # both ends of a dead connection wait: neither is at fault
    assert all(
        "is waiting for other ranks in phase COMPUTE" in text for text in ends["deaf"]["details"]["ranks"]
    )
    assert _blamed(ends["frozen_read"]) == ("hung", "a", 1, "DATA")
    for fault, inside in (("lock", "in lock"), ("deaf", "in all_reduce"), ("frozen_read", "in frozen_read")):
        first, second = _stacks(first_nodes[fault])
        assert "/torch/distributed/" in first
        assert inside in second, second

    stalled = first_nodes["stuck_read"].events("stalled")
    assert [event["rank"] for event in stalled] == [1]
    assert " makes no progress in phase DATA after step " in stalled[0]["text"]
    assert "in stuck_read" in _stacks(first_nodes["stuck_read"])[1]
    late = ends["stuck_read"]
    assert late["time_s"] > stalled[0]["time_s"]
    assert (late["reason"], late["failed_node"], late["details"]["rank"]) == ("failed", "a", 1)
    assert "rank 1: DataError: step " in late["text"]
    assert f"not read within data.deadline_s={DATA_DEADLINE_S['stuck_read']:g} s" in late["text"]


def _config(top: Path, fault: str) -> TrainConfig:
    folder = top / fault
    folder.mkdir()
    config = config_of(folder, STEPS, every_steps=STEPS)
    deadline_s = DATA_DEADLINE_S.get(fault, config.data.deadline_s)
    return config.model_copy(update={"data": config.data.model_copy(update={"deadline_s": deadline_s})})


def _has_ended(nodes: Cluster) -> bool:
    for node in nodes.nodes:
        assert node.process.poll() is None, node.log.read_text()[-3000:]
    return all(node.events("ranks_gone") for node in nodes.nodes)


def _blamed(ending: dict[str, Any]) -> tuple[str, str, int, str]:
    return (
        ending["reason"],
        ending["failed_node"],
        ending["details"]["rank"],
        ending["details"]["section"],
    )


def _stacks(node: Node) -> list[str]:
    """The kept stacks of all ranks in the first round."""
    paths = sorted((Path(node.config.run) / "supervisors" / "stacks").glob("round-000001-rank-*.stack"))
    return [path.read_text() for path in paths]
