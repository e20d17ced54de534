"""A run that changes its world size and its ZeRO stage matches an unchanged run, up to rounding."""

from pathlib import Path

import pytest
import torch

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.partition import MASTER
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.train.run_folder import root_of
from tests.support.ranks import jobs
from tests.support.ranks.processes import run

pytestmark = pytest.mark.dist

LIMIT = {"fp32": 1e-5, "bf16": 1e-2}
STEPS_EACH = 4
WORLDS = [(1, 2), (2, 2), (4, 2), (3, 2), (1, 2)]
STAGES = [(2, 1), (2, 3), (2, 2)]
"""(world size, ZeRO stage) of each part of a run."""


def config_of(folder: Path, data: Path, precision: str, stage: int, steps: int) -> TrainConfig:
    config = jobs.small_config(folder, data, precision=precision, zero_stage=stage)
    return jobs.saving(config, steps, every_steps=STEPS_EACH)


def weights(config: TrainConfig) -> torch.Tensor:
    """Return the final fp32 weights, with the k part of the qkv biases set to zero.

    The true gradient of that part is 0: softmax ignores a constant added to all its inputs. The computed
    gradient is rounding noise, and Adam turns it into steps of full size.
    """
    root = root_of(config)
    state = Checkpoint(root, committed(root)[0]).read_whole(MASTER)
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            tensor.chunk(3)[1].zero_()
    return torch.cat([tensor.flatten() for tensor in state.values()])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("parts", [WORLDS, STAGES], ids=["world size", "stage"])
def test_world_size_and_stage_may_change(
    data: Path, tmp_path: Path, precision: str, parts: list[tuple[int, int]]
) -> None:
    steps = STEPS_EACH * len(parts)
    world, stage = parts[0]
    straight = config_of(tmp_path / "straight", data, precision, stage, steps)
    assert run(world, jobs.train, straight) == [0] * world
    for number, (world, stage) in enumerate(parts, 1):
        moved = config_of(tmp_path / "moved", data, precision, stage, STEPS_EACH * number)
        groups = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        assert run(world, jobs.train_and_report, moved) == [(groups,)] * world
    curve = [
        abs(got["loss"] / wanted["loss"] - 1)
        for got, wanted in zip(jobs.losses(moved), jobs.losses(straight), strict=True)
    ]
    difference = weights(moved) - weights(straight)
    relative = (difference.norm() / weights(straight).norm()).item()
    print(f"{precision}, (world, stage) {parts}: relative difference of the loss by step")
    print(" ".join(f"{value:.1e}" for value in curve))
    print(f"weights: relative {relative:.1e}, largest {difference.abs().max().item():.1e}")
    assert len(curve) == steps
    assert max(curve) < LIMIT[precision]
    assert relative < LIMIT[precision]


@pytest.mark.parametrize("world", [1, 5, 6, 7])
def test_any_world_size_up_to_the_global_batch(data: Path, tmp_path: Path, world: int) -> None:
    config = config_of(tmp_path, data, "fp32", 2, 3)
    assert run(world, jobs.train, config, True) == [0] * world
    wanted = jobs.plain_training(config)[0]
    for row, expected in zip(jobs.losses(config), wanted, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
