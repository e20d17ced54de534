"""A run that stops goes on from its newest checkpoint, to the same bits at the same world size."""

import os
import signal
from pathlib import Path

import pytest

from dit_scale.config import TrainConfig
from dit_scale.errors import ConfigError
from dit_scale.checkpoint.attempts import committed
from dit_scale.train.run import root_of
from tests.dist import jobs
from tests.dist.points import Hold
from tests.dist.processes import TIMEOUT_S, run, start
from tests.dist.runs import events, final_files, wait_for
from tests.latents import write_latents

pytestmark = pytest.mark.dist

STEPS = 12
WORLD = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, num=40)
    return folder


def config_of(folder: Path, data: Path, stage: int = 2) -> TrainConfig:
    return jobs.saving(jobs.small_config(folder, data, zero_stage=stage), steps=STEPS, every_steps=4)


@pytest.fixture(scope="module", params=[1, 2, 3])
def straight(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, TrainConfig]:
    """An uninterrupted run at each ZeRO stage."""
    config = config_of(tmp_path_factory.mktemp(f"straight{request.param}"), data, request.param)
    assert run(WORLD, jobs.train, config) == [0, 0]
    return request.param, config


def test_started_twice_gives_the_same_bits(
    straight: tuple[int, TrainConfig], data: Path, tmp_path: Path
) -> None:
    stage, first = straight
    again = config_of(tmp_path, data, stage)
    assert run(WORLD, jobs.train, again) == [0, 0]
    assert final_files(again) == final_files(first)
    assert jobs.losses(again) == jobs.losses(first)


def test_sigterm_saves_at_a_step_boundary_and_asks_to_be_requeued(
    straight: tuple[int, TrainConfig], data: Path, tmp_path: Path
) -> None:
    stage, uninterrupted = straight
    config = config_of(tmp_path / "run", data, stage)
    hold = Hold(tmp_path, "behind the step", 3)
    ranks, answers = start(WORLD, jobs.train_held, config, hold, 1)
    wait_for(hold, answers)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGTERM)
    hold.go.touch()
    assert [answers.get(timeout=TIMEOUT_S)[1:] for _ in range(WORLD)] == [(None, 75)] * WORLD
    for process in ranks:
        process.join()
    saved = int(committed(root_of(config))[0].split("/")[1].split("-")[0])
    assert saved in (3, 4), "at the next step boundary that all ranks agree on"
    assert run(WORLD, jobs.train, config) == [0, 0]
    assert final_files(config) == final_files(uninterrupted)
    assert jobs.losses(config) == jobs.losses(uninterrupted)


def test_damaged_checkpoint_is_passed_over(data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, data)
    assert run(WORLD, jobs.train, config) == [0, 0]
    whole = final_files(config)
    newest = Path(config.run) / committed(root_of(config))[0]
    victim = newest / "rank-00001.safetensors"
    damaged = bytearray(victim.read_bytes())
    damaged[-1] ^= 1
    victim.write_bytes(damaged)
    assert run(WORLD, jobs.train, config) == [0, 0]
    assert final_files(config) == whole
    (note,) = events(config, "start")[-1]["notes"]
    assert f"passing over checkpoint checkpoints/{newest.name}" in note
    assert "rank-00001.safetensors" in note


def test_another_configuration_is_refused(data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, data).model_copy(update={"steps": 1})
    assert run(1, jobs.train, config) == [0]
    other = config.model_copy(update={"seed": 1, "steps": 2})
    with pytest.raises(AssertionError, match="seed was 0, is 1") as failure:
        run(1, jobs.train, other)
    assert ConfigError.__name__ in str(failure.value)
