"""What real runs measure at their log points, against what the same steps compute in other ways."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dit_scale.checkpoint.partition import MASTER
from dit_scale.config import TrainConfig
from dit_scale.data.shards import LatentDataset
from dit_scale.diffusion import schedule as schedules
from dit_scale.models.zoo import forward_macs, shape_of
from dit_scale.telemetry import clock
from dit_scale.telemetry.meters import COLUMNS
from dit_scale.telemetry.pace import TIMED_KEYS
from dit_scale.train import loop
from dit_scale.train.ema import Ema
from dit_scale.train.engine import Engine
from dit_scale.train.objective import SampleLosses, losses
from dit_scale.train.saving import Saves
from tests.support.latents import write_latents
from tests.support.micro_batches import read_micro_batch
from tests.support.ranks import jobs, rollback_jobs
from tests.support.ranks.processes import run
from tests.support.ranks.record import rows
from tests.support.ranks.runs import events

pytestmark = pytest.mark.dist

QUARTERS = [f"loss_q{quarter}" for quarter in range(4)]
KEYS = {"step", "samples", "lr", *COLUMNS, "loss_max", *QUARTERS, "update_ratio", *TIMED_KEYS}


def all_rows(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in jobs.losses_so_far(config)]


# Samples


def losses_of_the_first_step(config: TrainConfig) -> SampleLosses:
    """Return the losses of the first global batch, from one plain forward pass."""
    dataset = LatentDataset.open(config.data.url)
    count = config.global_batch
    batch = read_micro_batch(
        dataset, torch.arange(count).numpy(), count, config.seed, config.data.horizontal_flip
    )
    with torch.no_grad():
        return losses(
            jobs.plain_model(config),
            schedules.linear(config.diffusion.timesteps),
            batch,
            seed=config.seed,
            latent_scale=dataset.info.vae.scale,
            null_class=config.model.num_classes,
            label_dropout=config.diffusion.label_dropout,
        )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_largest_loss_and_the_quarters_are_those_of_the_samples(
    data: Path, tmp_path: Path, world: int
) -> None:
    config = jobs.saving(jobs.small_config(tmp_path, data), steps=1)
    assert run(world, jobs.train, config, True) == [0] * world
    (row,) = all_rows(config)
    plain = losses_of_the_first_step(config)
    assert row["loss_max"] == pytest.approx(plain.total_B.max().item(), rel=1e-5)
    quarter_B = plain.t_B // 250
    for quarter, name in enumerate(QUARTERS):
        mine = plain.total_B[quarter_B == quarter]
        assert row[name] == (pytest.approx(mine.mean().item(), rel=1e-5) if len(mine) else None)


# Updates


def squared_norms(config: TrainConfig) -> list[tuple[float, float]]:
    """Train as one rank; return the squared norms of each step's update and of the masters after it."""
    found: list[tuple[float, float]] = []
    step = Engine.step

    def masters(engine: Engine) -> Tensor:
        parts = (
            partition.buffers[MASTER][piece.offset : piece.offset + piece.length]
            for partition in engine.owned
            for piece in partition.slices
        )
        return torch.cat([part.detach().double() for part in parts])

    def step_and_compare(engine: Engine, *args: Any) -> Any:
        before = masters(engine)
        result = step(engine, *args)
        after = masters(engine)
        found.append(((after - before).square().sum().item(), after.square().sum().item()))
        return result

    with patch.object(Engine, "step", step_and_compare):
        assert loop.train(config) == 0
    return found


@pytest.mark.parametrize(
    ("world", "stage", "precision"), [(1, 2, "bf16"), (2, 1, "bf16"), (2, 2, "fp32"), (3, 3, "bf16")]
)
def test_the_update_ratio_is_that_of_the_update_that_was_made(
    data: Path, tmp_path: Path, world: int, stage: int, precision: str
) -> None:
    config = jobs.saving(jobs.small_config(tmp_path, data, zero_stage=stage, precision=precision), steps=3)
    optimizer = config.optimizer.model_copy(update={"weight_decay": 0.1, "lr": 0.01, "warmup_steps": 10})
    config = config.model_copy(update={"optimizer": optimizer})
    of_ranks = run(world, squared_norms, config)
    for number, row in enumerate(all_rows(config)):
        update_sq, master_sq = (sum(rank[number][i] for rank in of_ranks) for i in (0, 1))
        made = (update_sq / master_sq) ** 0.5
        print(f"step {row['step']}: {row['update_ratio']:.8f}, made {made:.8f}")
        assert row["update_ratio"] == pytest.approx(made, rel=1e-4)


def test_the_update_ratio_of_a_skipped_step_is_that_of_the_update_before_it(tmp_path: Path) -> None:
    write_latents(tmp_path / "latents", num=rollback_jobs.NUM)
    rollback_jobs.spoil(tmp_path / "latents", [rollback_jobs.sample_of(step, place=1) for step in (1, 3, 4)])
    config = jobs.saving(rollback_jobs.config_of(tmp_path / "run", tmp_path / "latents"), steps=5)
    optimizer = config.optimizer.model_copy(update={"warmup_steps": 10})
    config = config.model_copy(update={"optimizer": optimizer})
    assert run(2, jobs.train, config) == [0, 0]
    found = all_rows(config)
    assert [row["skipped"] for row in found] == [1, 0, 1, 1, 0]
    none, second, *after, fifth = (row["update_ratio"] for row in found)
    assert none is None
    assert second > 0
    assert after == [second] * 2
    assert fifth not in (0, second)


# Time


def train_with_fast_clock(config: TrainConfig, victim: int) -> int:
    """Train as one rank; the clock of rank `victim` is so fast that its work takes longest."""
    counter, factor = time.perf_counter, 10_000 if int(os.environ["RANK"]) == victim else 1
    with patch.object(clock.time, "perf_counter", lambda: factor * counter()):
        return loop.train(config)


@pytest.mark.parametrize("victim", [0, 2])
def test_every_key_is_recorded_and_the_slowest_rank_is_named(data: Path, tmp_path: Path, victim: int) -> None:
    config = jobs.saving(jobs.small_config(tmp_path, data), steps=4)
    assert run(3, train_with_fast_clock, config, victim) == [0] * 3
    (start,) = events(config, "start")
    assert (start["peak_tflops"], start["peak_measured"]) == (jobs.PEAK_TFLOPS, False)
    flops = 6 * forward_macs(shape_of(config.model)) * config.global_batch
    for row in all_rows(config):
        assert row.keys() == KEYS
        assert row["slowest_rank"] == victim
        assert row["slowest_ratio"] > 1
        assert row["mfu"] == pytest.approx(flops / row["step_s_p50"] / (3 * jobs.PEAK_TFLOPS * 1e12))
        assert 0 < row["step_s_p50"] <= row["step_s_p99"]
        assert 0 <= row["data_wait"] <= 1
        assert 0 < row["memory_gib"] <= row["memory_peak_gib"]


def test_without_a_stated_peak_each_start_measures_it(data: Path, tmp_path: Path) -> None:
    config = jobs.saving(jobs.small_config(tmp_path, data), steps=1)
    config = config.model_copy(update={"log": config.log.model_copy(update={"peak_tflops": 0.0})})
    assert run(2, jobs.train, config) == [0, 0]
    (start,) = events(config, "start")
    assert start["peak_measured"]
    (row,) = all_rows(config)
    flops = 6 * forward_macs(shape_of(config.model)) * config.global_batch
    assert row["mfu"] == pytest.approx(flops / row["step_s_p50"] / (2e12 * start["peak_tflops"]), rel=1e-3)


# Earlier versions


def train_as_before(config: TrainConfig) -> int:
    """Train as one rank until a signal at step 2, and save what an earlier version would save."""
    manifest, update = Saves._manifest, Ema.update

    def short(saves: Saves) -> Any:
        found = manifest(saves)
        rows_of_steps = tuple(row[: len(COLUMNS)] for row in found.pending_metrics)
        return found.model_copy(update={"pending_metrics": rows_of_steps})

    def update_and_stop(ema: Ema, step: int) -> None:
        update(ema, step)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with patch.object(Saves, "_manifest", short), patch.object(Ema, "update", update_and_stop):
        return loop.train(config)


def test_a_checkpoint_of_an_earlier_version_resumes_between_two_log_points(
    data: Path, tmp_path: Path
) -> None:
    straight = jobs.saving(jobs.small_config(tmp_path / "straight", data), steps=4)
    straight = straight.model_copy(update={"log": straight.log.model_copy(update={"every_steps": 4})})
    assert run(2, jobs.train, straight) == [0, 0]
    config = straight.model_copy(update={"run": str(tmp_path / "earlier")})
    assert run(2, train_as_before, config) == [75, 75]
    assert run(2, jobs.train, config) == [0, 0]
    assert [event["step"] for event in events(config, "start")] == [0, 3]
    (whole,), (row,) = rows(straight), rows(config)
    # Only the last step has its samples.
    by_sample = ("loss_max", *QUARTERS)
    assert {name: row[name] for name in row if name not in by_sample} == {
        name: whole[name] for name in whole if name not in by_sample
    }
    assert 0 < row["loss_max"] <= whole["loss_max"]
