"""A stopped run resumes from its newest checkpoint and produces the same bits at the same world size."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import EmaProfile, TrainConfig
from dit_scale.errors import ConfigError
from dit_scale.train.run_folder import root_of
from tests.support.ranks import jobs
from tests.support.ranks.points import Hold
from tests.support.ranks.processes import TIMEOUT_S, run, start
from tests.support.ranks.runs import events, final_files, wait_for

pytestmark = pytest.mark.dist

STEPS = 12
WORLD = 2


def config_of(folder: Path, data: Path, **engine: object) -> TrainConfig:
    return jobs.saving(jobs.small_config(folder, data, **engine), steps=STEPS, every_steps=4)


# In bf16 the weights are cast from the masters in the checkpoint: by DeepSpeed's BF16_Optimizer at stage 1,
# shard by shard at stage 3.
ENGINES: list[dict[str, object]] = [
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 2, "precision": "fp32"},
    {"zero_stage": 3, "precision": "bf16"},
]


@pytest.fixture(scope="module", params=ENGINES, ids=["stage 1", "stage 2", "stage 3"])
def straight(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    """An uninterrupted run at each ZeRO stage."""
    config = config_of(tmp_path_factory.mktemp("straight"), data, **request.param)
    assert run(WORLD, jobs.train, config) == [0, 0]
    return config


def like(straight: TrainConfig, folder: Path) -> TrainConfig:
    """Return the same configuration with another run folder."""
    return straight.model_copy(update={"run": str(folder)})


def test_started_twice_gives_the_same_bits(straight: TrainConfig, tmp_path: Path) -> None:
    again = like(straight, tmp_path)
    assert run(WORLD, jobs.train, again) == [0, 0]
    assert final_files(again) == final_files(straight)
    assert jobs.losses(again) == jobs.losses(straight)


def test_sigterm_saves_after_the_step_and_requests_a_requeue(straight: TrainConfig, tmp_path: Path) -> None:
    config = like(straight, tmp_path / "run")
    hold = Hold(tmp_path, "inside backward", 5)
    ranks, answers = start(WORLD, jobs.train_held, config, hold, 1)
    wait_for(hold, answers)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGTERM)
    hold.go.touch()
    assert [answers.get(timeout=TIMEOUT_S)[1:] for _ in range(WORLD)] == [(None, 75)] * WORLD
    for process in ranks:
        process.join()
    assert committed(root_of(config))[0].step == 5
    assert run(WORLD, jobs.train, config) == [0, 0]
    assert final_files(config) == final_files(straight)
    assert jobs.losses(config) == jobs.losses(straight)


def test_a_damaged_checkpoint_is_skipped(data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, data)
    assert run(WORLD, jobs.train, config) == [0, 0]
    whole = final_files(config)
    newest = Path(config.run) / committed(root_of(config))[0].path()
    victim = newest / "rank-00001.safetensors"
    damaged = bytearray(victim.read_bytes())
    damaged[-1] ^= 1
    victim.write_bytes(damaged)
    assert run(WORLD, jobs.train, config) == [0, 0]
    assert final_files(config) == whole
    (note,) = events(config, "start")[-1]["notes"]
    assert f"skipping checkpoint checkpoints/{newest.name}" in note
    assert "rank-00001.safetensors" in note


def test_another_configuration_is_refused(data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, data).model_copy(update={"steps": 1})
    assert run(1, jobs.train, config) == [0]
    other = config.model_copy(update={"seed": 1, "steps": 2})
    with pytest.raises(AssertionError, match="seed was 0, is 1") as failure:
        run(1, jobs.train, other)
    assert ConfigError.__name__ in str(failure.value)


def test_an_average_keeps_its_width(data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, data).model_copy(update={"steps": 1})
    assert run(1, jobs.train, config) == [0]
    saved = committed(root_of(config))
    constant = config.ema[0]
    other = config.model_copy(update={"steps": 2, "ema": (constant, EmaProfile(name="power", sigma_rel=0.2))})
    with pytest.raises(
        AssertionError, match=r"'power' has sigma_rel 0\.2, but sigma_rel 0\.1 in "
    ) as failure:
        run(1, jobs.train, other)
    assert ConfigError.__name__ in str(failure.value)
    assert committed(root_of(config)) == saved
    assert "sigma_rel: 0.2" not in (tmp_path / "config.yaml").read_text()


def test_averages_can_be_added_and_removed(data: Path, tmp_path: Path) -> None:
    config = jobs.saving(config_of(tmp_path / "run", data), steps=4, every_steps=4)
    kept, gone, new = *config.ema, EmaProfile(name="new", decay=0.5)
    assert run(WORLD, jobs.train, config) == [0, 0]
    longer = config.model_copy(update={"steps": 5})
    changed = longer.model_copy(update={"ema": (kept, new)})
    straight = longer.model_copy(update={"run": str(tmp_path / "straight")})
    assert run(WORLD, jobs.train, changed) == [0, 0]
    assert run(WORLD, jobs.train, straight) == [0, 0]
    assert events(config, "start")[-1]["notes"] == [
        "ema.new: not in the checkpoint, starts from its weights",
        "ema.power: in the checkpoint but no longer configured, dropped",
        "steps: 4 -> 5",
    ]
    before, after, whole = (
        Checkpoint(root_of(run), committed(root_of(run))[number])
        for run, number in ((changed, 1), (changed, 0), (straight, 0))
    )
    assert gone.name == "power"
    assert before.manifest.ema_since == {"constant": 0, "power": 0}
    assert after.manifest.ema_since == {"constant": 0, "new": 4}
    assert after.kinds() == {"master", "exp_avg", "exp_avg_sq", "ema.constant", "ema.new"}
    for name, weights in after.read_whole("master").items():
        start = before.read_whole("master")[name]
        assert torch.equal(weights, whole.read_whole("master")[name])
        assert torch.equal(after.read_whole("ema.new")[name], torch.lerp(start, weights, 0.5))
        assert torch.equal(after.read_whole("ema.constant")[name], whole.read_whole("ema.constant")[name])


def test_a_save_due_during_another_waits_for_it(straight: TrainConfig, tmp_path: Path) -> None:
    config = like(straight, tmp_path / "run")
    hold = Hold(tmp_path, "writer: before the file", 1)
    ranks, answers = start(WORLD, jobs.train_held_unpaced, config, hold, 0)
    wait_for(hold, answers)
    deadline = time.monotonic() + TIMEOUT_S
    while len(jobs.losses_so_far(config)) < 10:  # past step 8, where another save is due
        assert time.monotonic() < deadline, "training does not go on during a save"
        time.sleep(0.01)
    hold.go.touch()
    assert [answers.get(timeout=TIMEOUT_S)[1:] for _ in range(WORLD)] == [(None, 0)] * WORLD
    for process in ranks:
        process.join()
    first, *later = [event["step"] for event in events(config, "save")]
    assert first == 4
    assert min(later) >= 10
    assert later[-1] == STEPS
    assert not events(config, "save_failed")
    assert final_files(config) == final_files(straight)
