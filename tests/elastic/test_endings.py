"""Two nodes whose processes are killed, stopped and signalled: the cause is named and nothing is lost."""

import os
import re
import signal
from pathlib import Path

import pytest

from dit_scale.config import TrainConfig
from tests.support.nodes.nodes import TIMEOUT_S, Node, cluster, config_of
from tests.support.ranks import jobs
from tests.support.ranks.processes import run
from tests.support.ranks.record import differences_at_the_end, last_step

pytestmark = pytest.mark.dist

STEPS = 100_000
"""More than the run takes before it is asked to stop."""
MEASURED_STEPS = 20
"""After this many steps a rank that waits too long is detected."""


def test_a_run_of_two_nodes_survives_all_that_happens_to_its_processes(tmp_path: Path) -> None:
    """Rounds that need no step of their own are ended while their ranks import, which saves time."""
    config = config_of(tmp_path, STEPS, every_steps=3)
    with cluster(config) as nodes:
        a, b = (nodes.start(name, "--nodes", "2") for name in "ab")
        nodes.wait_for_step(2)
        _the_logs_are_ours(a, b)
        launcher, step = a.launcher(), last_step(_record(config))
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(launcher, number)
        nodes.wait_for_step(step + 3)
        assert a.launcher() == launcher, "it ignores signals that are for ranks"
        nodes.wait_for_commit()
        rank = _signal_rank(b, signal.SIGKILL)
        nodes.wait_for_ranks(a, 2)
        text = _text(a)
        assert text.startswith(f"rank 1 (process {rank}) was killed in "), text

        os.kill(a.launcher(), signal.SIGKILL)
        nodes.wait_for_round(a, 3)
        assert "the launcher exited with code -9 before all of its ranks had" in _text(a)

        nodes.wait_for_step(last_step(_record(config)) + MEASURED_STEPS)
        nodes.wait_for_commit()
        rank = _signal_rank(b, signal.SIGSTOP)
        for node in (a, b):
            nodes.wait_for_ranks(node, 4)
        assert f"rank 1 (process {rank}) is stopped in " in _text(b)
        assert len(b.events("round_ended")[-1]["details"]["ranks"]) == 2
        _stacks_are_kept(config, round_=3)
        assert a.endings() == b.endings()
        assert a.endings() == [("failed", "b"), ("failed", "a"), ("hung", "b")]

        for node in (a, b):
            node.process.send_signal(signal.SIGUSR1)
        assert (a.exit_code(), b.exit_code()) == (75, 75)
        end = config.model_copy(update={"steps": last_step(_record(config)) + 5})
        a, b = (nodes.start(name, "--nodes", "2", config=end) for name in "ab")
        assert (a.exit_code(), b.exit_code()) == (0, 0)
        assert [reason for reason, _ in a.endings()[-2:]] == ["leaving", "done"]
    straight = end.model_copy(update={"run": str(tmp_path / "straight")})
    assert run(2, jobs.train, straight, timeout_s=TIMEOUT_S) == [0, 0]
    assert differences_at_the_end(end, straight) == []


def _the_logs_are_ours(first: Node, second: Node) -> None:
    """Check for lines of launchers, DeepSpeed or torch that no user can act on."""
    run = re.escape(first.config.run)
    for node, begin in ((first, rf"\[a\] |DiT-Ti/2 at |{run}: a new run|[\d:]+  step "), (second, r"\[b\] ")):
        lines = node.log.read_text().split("\n")[:-1]  # the last one may be incomplete
        assert lines
        assert [line for line in lines if not re.match(begin, line)] == []


def _signal_rank(node: Node, number: signal.Signals) -> int:
    """Send a signal to the only rank of a node and return its process id."""
    (pid,) = node.ranks().values()
    os.kill(pid, number)
    return pid


def _record(config: TrainConfig) -> Path:
    return Path(config.run) / "metrics.jsonl"


def _text(node: Node) -> str:
    text: str = node.events("round_ended")[-1]["text"]
    return text


def _stacks_are_kept(config: TrainConfig, round_: int) -> None:
    folder = Path(config.run) / "supervisors" / "stacks"
    stacks = sorted(folder.glob(f"round-{round_:06d}-rank-*.stack"))
    assert [path.name[-11:] for path in stacks] == ["00000.stack", "00001.stack"]
    assert all("loop.py" in path.read_text() for path in stacks)
