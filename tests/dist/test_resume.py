"""A run that is killed goes on from its newest checkpoint, to the same bits at the same world size."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dit_scale.config import TrainConfig
from dit_scale.errors import ConfigError
from dit_scale.storage import open_storage
from dit_scale.train.checkpoint import committed
from dit_scale.train.run import checkpoints_of
from tests.dist import jobs
from tests.dist.processes import TIMEOUT_S, run, start
from tests.latents import write_latents

pytestmark = pytest.mark.dist

STEPS = 12
WORLD = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, num=40)
    return folder


def config_of(folder: Path, data: Path, stage: int = 2, precision: str = "bf16") -> TrainConfig:
    config = jobs.small_config(folder, data, zero_stage=stage, precision=precision)
    checkpoint = config.checkpoint.model_copy(update={"every_steps": 4})
    return config.model_copy(update={"steps": STEPS, "checkpoint": checkpoint})


@pytest.fixture(scope="module", params=[1, 2, 3])
def straight(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, TrainConfig]:
    """An uninterrupted run at each ZeRO stage."""
    config = config_of(tmp_path_factory.mktemp(f"straight{request.param}"), data, request.param)
    assert run(WORLD, jobs.train, config) == [0, 0]
    return request.param, config


def final_files(config: TrainConfig) -> list[bytes]:
    """Every rank's file of the newest checkpoint: masters, moments, averages."""
    folder = Path(checkpoints_of(config.run)) / committed(open_storage(checkpoints_of(config.run)))[0]
    assert int(folder.name.split("-")[0]) == config.steps
    return [path.read_bytes() for path in sorted(folder.glob("rank-*.safetensors"))]


def start_and_hold(config: TrainConfig, step: int) -> tuple[list[Any], Any]:
    """Start a run, and return when it stands behind this step."""
    jobs.hold_file(config).touch()
    ranks, answers = start(WORLD, jobs.train_and_hold, config, step)
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if (Path(config.run) / "metrics.jsonl").exists() and len(jobs.losses_so_far(config)) >= step:
            return ranks, answers
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within {TIMEOUT_S} s")


def test_started_twice_gives_the_same_bits(
    straight: tuple[int, TrainConfig], data: Path, tmp_path: Path
) -> None:
    stage, first = straight
    again = config_of(tmp_path, data, stage)
    assert run(WORLD, jobs.train, again) == [0, 0]
    assert final_files(again) == final_files(first)
    assert jobs.losses(again) == jobs.losses(first)


def test_killed_and_resumed_gives_the_same_bits(
    straight: tuple[int, TrainConfig], data: Path, tmp_path: Path
) -> None:
    stage, uninterrupted = straight
    config = config_of(tmp_path, data, stage)
    for kill_at, victim in ((5, 1), (9, 0)):
        ranks, _ = start_and_hold(config, kill_at)
        for process in (ranks[victim], ranks[1 - victim]):
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    assert run(WORLD, jobs.train, config) == [0, 0]
    assert final_files(config) == final_files(uninterrupted)
    assert jobs.losses(config) == jobs.losses(uninterrupted)


def test_sigterm_saves_at_a_step_boundary_and_asks_to_be_requeued(
    straight: tuple[int, TrainConfig], data: Path, tmp_path: Path
) -> None:
    stage, uninterrupted = straight
    config = config_of(tmp_path, data, stage)
    ranks, answers = start_and_hold(config, 2)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGTERM)
    jobs.hold_file(config).unlink()
    assert [answers.get(timeout=TIMEOUT_S)[1:] for _ in range(WORLD)] == [(None, 75)] * WORLD
    for process in ranks:
        process.join()
    assert run(WORLD, jobs.train, config) == [0, 0]
    assert final_files(config) == final_files(uninterrupted)
    assert jobs.losses(config) == jobs.losses(uninterrupted)


def test_damaged_checkpoint_is_passed_over(data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, data)
    assert run(WORLD, jobs.train, config) == [0, 0]
    whole = final_files(config)
    newest = Path(checkpoints_of(config.run)) / committed(open_storage(checkpoints_of(config.run)))[0]
    victim = newest / "rank-00001.safetensors"
    damaged = bytearray(victim.read_bytes())
    damaged[-1] ^= 1
    victim.write_bytes(damaged)
    assert run(WORLD, jobs.train, config) == [0, 0]
    assert final_files(config) == whole
    events = [json.loads(line) for line in (Path(config.run) / "events.jsonl").read_text().splitlines()]
    (note,) = [event for event in events if event["event"] == "start"][-1]["notes"]
    assert f"passing over checkpoint {newest.name}" in note
    assert "rank-00001.safetensors" in note


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_world_size_and_stage_go_on_to_rounding(data: Path, tmp_path: Path, precision: str) -> None:
    straight = config_of(tmp_path / "straight", data, 1, precision)
    assert run(1, jobs.train, straight, True) == [0]
    moved = config_of(tmp_path / "moved", data, 1, precision)
    for steps, stage, world in ((4, 1, 1), (8, 3, 3), (12, 2, 2)):
        engine = moved.engine.model_copy(update={"zero_stage": stage})
        part = moved.model_copy(update={"steps": steps, "engine": engine})
        assert run(world, jobs.train, part, True) == [0] * world
    worst = max(
        abs(got["loss"] / wanted["loss"] - 1)
        for got, wanted in zip(jobs.losses(moved), jobs.losses(straight), strict=True)
    )
    print(f"{precision}: largest relative difference of the loss {worst:.1e}")
    assert worst < {"fp32": 1e-5, "bf16": 1e-2}[precision]


def test_another_configuration_is_refused(data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, data).model_copy(update={"steps": 1})
    assert run(1, jobs.train, config) == [0]
    other = config.model_copy(update={"seed": 1, "steps": 2})
    with pytest.raises(AssertionError, match="seed was 0, is 1") as failure:
        run(1, jobs.train, other)
    assert ConfigError.__name__ in str(failure.value)
