"""A replayed step equals the run's step, bit for bit on the same number of processes, and writes nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dit_scale.config import TrainConfig, dump
from dit_scale.report.replay import Replay, replay
from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.processes import run
from tests.support.ranks.rollback_jobs import BATCH, NUM, WORLD, config_of, damage, sample_of, spoil
from tests.support.ranks.runs import events

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Steps 5 to 8 fail. The run notices at step 8, rolls back to step 3 and excludes their samples."""
    folder = tmp_path_factory.mktemp("rolled_back")
    write_latents(folder / "latents", num=NUM)
    spoil(folder / "latents", [sample_of(step, place=6) for step in (5, 6, 7, 8)])
    config = config_of(folder / "run", folder / "latents", log_every_steps=4, rollback_after=2)
    config = jobs.saving(config, steps=9, keep=10)
    assert run(WORLD, jobs.train, config) == [0, 0]
    return config


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()
    }


def replayed(config: TrainConfig, step: int, attempt: int | None = None) -> Replay:
    """Replay on the world size of the run; the run is not changed."""
    before = content(Path(config.run))
    found, nothing = run(WORLD, replay, config.run, step, attempt)
    assert nothing is None
    assert content(Path(config.run)) == before
    assert isinstance(found, Replay)
    return found


def positions(found: Replay) -> list[int]:
    return sorted(sample.position for sample in found.samples)


def test_a_step_from_the_start_of_the_run(rolled_back: TrainConfig) -> None:
    found = replayed(rolled_back, step=2)
    assert found.checkpoint is None
    assert found.history.attempt.number == 1
    assert found.history.recorded is not None
    assert found.history.recorded.where == "checkpoints/0000000003-0001"
    assert found.differences() == {}
    assert positions(found) == list(range(BATCH, 2 * BATCH))
    assert [sample.loss for sample in found.samples] == sorted((s.loss for s in found.samples), reverse=True)
    assert sum(sample.loss for sample in found.samples) / BATCH == pytest.approx(found.row[0], rel=1e-6)
    assert all(sample.label == sample.sample_id % 10 for sample in found.samples)


def test_a_step_after_a_rollback(rolled_back: TrainConfig) -> None:
    found = replayed(rolled_back, step=6)
    assert found.checkpoint == "checkpoints/0000000003-0001"
    assert found.history.attempt.number == 2
    assert found.history.rolled_back == (1,)
    assert found.history.recorded is not None
    assert found.history.recorded.where == "checkpoints/0000000006-0002"
    assert found.differences() == {}
    assert positions(found) == list(range(9 * BATCH, 10 * BATCH))


def test_a_step_that_was_rolled_back(rolled_back: TrainConfig) -> None:
    (rollback,) = events(rolled_back, "rollback")
    found = replayed(rolled_back, step=6, attempt=rollback["attempt"])
    assert found.checkpoint == "checkpoints/0000000003-0001"
    assert found.row[-1] == 1.0
    assert found.history.recorded is not None
    assert found.history.recorded.where == "events.jsonl"
    assert found.differences() == {}
    assert found.history.rolled_back == ()
    assert positions(found) == list(range(5 * BATCH, 6 * BATCH))
    assert [sample.finite for sample in found.samples] == [False] + [True] * (BATCH - 1)
    assert found.samples[0].sample_id == sample_of(6, place=6)


def command(run: Path, attempt: int) -> tuple[dict[str, Any], str]:
    """Run `dit-scale replay --step 6` in one process; return its JSON and its stderr."""
    arguments = ["replay", str(run), "--step=6", f"--attempt={attempt}", "--json"]
    line = [sys.executable, "-m", "dit_scale.cli", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    tree = json.loads(done.stdout)
    assert (tree["attempt"], tree["world"], tree["world_of_the_run"]) == (attempt, 1, WORLD)
    assert len(tree["samples"]) == tree["num_samples"] == BATCH
    return tree, done.stderr


def test_the_command_at_another_world_size(rolled_back: TrainConfig) -> None:
    tree, beside = command(Path(rolled_back.run), attempt=2)
    assert all(difference < 1e-4 for difference in tree["differences"].values())
    assert "checkpoints/0000000003-0001\nsteps to replay first: 2\n" in beside


def test_the_command_on_a_run_that_moved_and_changed(rolled_back: TrainConfig, tmp_path: Path) -> None:
    shutil.copytree(rolled_back.run, tmp_path / "run")
    changed = rolled_back.optimizer.model_copy(update={"lr": 0.5})
    (tmp_path / "run" / "config.yaml").write_text(dump(rolled_back.model_copy(update={"optimizer": changed})))
    tree, beside = command(tmp_path / "run", attempt=1)
    assert (tree["loss"], tree["grad_norm"], tree["skipped"], tree["differences"]) == ("nan", "inf", 1.0, {})
    assert f"from {tmp_path}/run/checkpoints/0000000003-0001\n" in beside
    assert f"run: {rolled_back.run} -> {tmp_path}/run\n" in beside
    assert "optimizer.lr" not in beside, "the attempt took its steps at the rate that its checkpoints have"


def test_a_step_taken_at_another_learning_rate(rolled_back: TrainConfig, tmp_path: Path) -> None:
    run_of_old = rolled_back.model_copy(update={"run": str(tmp_path / "run")})
    shutil.copytree(rolled_back.run, run_of_old.run)
    faster = run_of_old.optimizer.model_copy(update={"lr": 0.5})
    (tmp_path / "run" / "config.yaml").write_text(dump(run_of_old.model_copy(update={"optimizer": faster})))
    found = replayed(run_of_old, step=9)
    assert found.history.recorded is not None
    assert found.checkpoint == "checkpoints/0000000006-0002"
    assert found.differences() == {}


def test_a_sample_that_was_replaced_during_the_run(tmp_path: Path) -> None:
    data, bad = tmp_path / "latents", sample_of(2, place=1)
    write_latents(data, num=NUM)
    config = jobs.saving(config_of(tmp_path / "run", data, damaged="quarantine"), steps=4, every_steps=4)
    damage(data, bad)
    assert run(WORLD, jobs.train, config) == [0, 0]
    damage(data, bad)  # the same bit again, so the file is intact
    found = replayed(config, step=2)
    assert found.history.recorded is not None
    assert found.history.recorded.where == "metrics.jsonl"
    assert found.differences() == {}
    assert [sample.sample_id for sample in found.samples if sample.position == BATCH + 1] == [bad + 1]
