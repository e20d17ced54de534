"""A real study: killed and continued, with a run that fails, its table and its figures."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dit_scale.lines import read_objects
from dit_scale.signals import REQUEUE_EXIT_CODE
from tests.support.speed import scaled

pytestmark = pytest.mark.dist

LIMIT_S = scaled(300.0)
STEPS = 12
STUDY = """
models: [DiT-Nano/4, DiT-Nano/2]
conditionings: [adaln_zero]
train:
  steps: 12
  global_batch: 4
  model: {image_size: 32, num_classes: 10}
  optimizer: {lr: 1.0e-3}
  engine: {device: cpu, precision: fp32, micro_batch: 4}
  ema: [{name: short, decay: 0.9}]
  checkpoint: {every_steps: 2}
  log: {every_steps: 1}
"""
CHEAP, DEAR = "DiT-Nano-4-adaln_zero", "DiT-Nano-2-adaln_zero"


@pytest.fixture
def command(tmp_path: Path, data: Path) -> list[str]:
    """The command of a study of two runs in tmp_path/study."""
    (tmp_path / "study.yaml").write_text(STUDY)
    settings = [f"folder={tmp_path / 'study'}", f"train.data.url={data}"]
    return [sys.executable, "-m", "dit_scale.cli", "scaling", str(tmp_path / "study.yaml"), *settings]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


def wait_for(step: int, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Wait until the first run of a study has recorded a step."""
    end_s = time.monotonic() + LIMIT_S
    while max((row["step"] for row in record(folder, CHEAP)), default=0) < step:
        assert process.poll() is None
        assert time.monotonic() < end_s
        time.sleep(0.02)


def record(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_objects(folder / "study/runs" / name / "metrics.jsonl", "step", "loss")


def results_of(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "study/results.json").read_text())
    return tree


def test_a_killed_study_continues_where_it_was(tmp_path: Path, command: list[str]) -> None:
    endless = [*command, "train.steps=100000"]
    killed = subprocess.Popen(endless, stdout=subprocess.DEVNULL)
    wait_for(3, killed, tmp_path)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    assert children
    killed.kill()
    killed.wait()
    # The run under way loses its parent, saves and exits: nothing trains on alone.
    end_s = time.monotonic() + LIMIT_S
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    log = tmp_path / "study/logs" / f"{CHEAP}.log"
    assert "stopped on request at step" in log.read_text()

    reached = record(tmp_path, CHEAP)[-1]["step"]
    continued = subprocess.Popen(endless, stdout=subprocess.DEVNULL)
    wait_for(reached + 3, continued, tmp_path)
    continued.send_signal(signal.SIGTERM)
    assert continued.wait(LIMIT_S) == REQUEUE_EXIT_CODE
    assert log.read_text().count("stopped on request at step") == 2
    steps = [row["step"] for row in record(tmp_path, CHEAP)]
    assert steps == list(range(1, len(steps) + 1))
    assert record(tmp_path, DEAR) == []


def test_a_failed_run_is_named_and_the_next_start_completes_the_study(
    tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "study/runs").mkdir(parents=True)
    (tmp_path / "study/runs" / CHEAP).write_text("in the way")
    failed = run(command)
    assert failed.returncode == 1, failed.stderr
    assert f"[1/2] {CHEAP}: FAILED with exit code" in failed.stdout
    assert f"1 runs failed: {CHEAP}" in failed.stdout
    assert [one["finished"] for one in results_of(tmp_path)["runs"]] == [False, True]

    (tmp_path / "study/runs" / CHEAP).unlink()
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert f"[2/2] {DEAR}: trained already" in done.stdout
    for name in (CHEAP, DEAR):
        assert [row["step"] for row in record(tmp_path, name)] == list(range(1, STEPS + 1))
    tree = results_of(tmp_path)
    assert [one["finished"] for one in tree["runs"]] == [True, True]
    assert tree["fits"][0]["law"]["points"] == 2
    assert tree["runs"][0]["images"] == 4 * STEPS
    assert (tmp_path / "study/figures/figure_08_compute_loss.png").stat().st_size > 0

    again = run([*command, "--read"])
    assert (again.returncode, results_of(tmp_path)) == (0, tree)
    other = run([*command, "train.optimizer.lr=2e-3"])
    assert other.returncode == 2
    assert "holds another study: train.optimizer.lr was 0.001, is 0.002" in other.stderr
