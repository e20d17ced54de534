"""A supervisor on a terminal, and signals that reach all processes of a node at the same time."""

import os
import signal
import sys
from pathlib import Path

import pytest

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import CheckpointId
from dit_scale.config import TrainConfig, dump
from dit_scale.train.run_folder import root_of
from tests.support.nodes.nodes import TIMEOUT_S, Cluster, cluster, config_of
from tests.support.ranks.record import last_step
from tests.support.ranks.terminal import Terminal

pytestmark = pytest.mark.dist

ENDLESS = 100_000


def test_a_closed_terminal_makes_the_supervisor_save(tmp_path: Path) -> None:
    config = config_of(tmp_path, ENDLESS, every_steps=ENDLESS)
    (tmp_path / "run.yaml").write_text(dump(config))
    arguments = ["launch", str(tmp_path / "run.yaml"), "--slots", "2", "--address", "127.0.0.1"]
    terminal = Terminal([sys.executable, "-m", "dit_scale.cli", *arguments])

    def stepped() -> bool:
        terminal.read()
        return last_step(Path(config.run) / "metrics.jsonl") >= 2

    Cluster(config).wait(stepped, "step 2")
    terminal.close()
    assert terminal.process.wait(TIMEOUT_S) == 75
    _all_is_saved(config)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT], ids=lambda one: one.name)
def test_a_signal_to_all_processes_of_a_node_makes_it_save(tmp_path: Path, number: signal.Signals) -> None:
    config = config_of(tmp_path, ENDLESS, every_steps=ENDLESS)
    with cluster(config) as nodes:
        node = nodes.start("a", slots=2)
        nodes.wait_for_step(2)
        for pid in (*node.processes(), node.process.pid):
            os.kill(pid, number)
        assert node.exit_code() == 75
        assert node.endings() == [("leaving", "a")]
        assert "Traceback" not in node.log.read_text()
        _all_is_saved(config)
        few = config.model_copy(update={"steps": last_step(Path(config.run) / "metrics.jsonl") + 2})
        assert nodes.start("a", slots=2, config=few).exit_code() == 0


def _all_is_saved(config: TrainConfig) -> None:
    (newest,) = committed(root_of(config))
    assert newest == CheckpointId(last_step(Path(config.run) / "metrics.jsonl"), 1)
