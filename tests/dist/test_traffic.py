"""What two processes send in a step is what the formula says, and what the formula says about DiT-XL/2."""

from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.train_step import random_batch
from dit_scale import dist
from dit_scale.config import ModelConfig, TrainConfig
from dit_scale.data.batch_plan import batch_plan
from dit_scale.models.zoo import shape_of
from dit_scale.train import memory, traffic
from dit_scale.train.trainer import Trainer
from tests.support.collectives import Collectives
from tests.support.ranks import jobs
from tests.support.ranks.processes import run

WORLD = 2
SMALL = 10_000
NUM_SUMS_OF_NUMBERS = {(1, "bf16"): 1}
"""Sums of a few numbers per step: losses and norm, except where every rank has the whole gradient."""

SMALL_SUMS_BYTES = 4 * (11 + WORLD + 1)
"""What the samples add up to (`dit_scale/train/sample_sums.py`), and the norm."""


def count_step(config: TrainConfig) -> Collectives:
    """Count the collectives of a step; in the first ones, ZeRO-3 compares its trace among the ranks."""
    world = dist.start(config.engine)
    try:
        plan, shape = memory.plan_of(config, world.size), shape_of(config.model)
        with patch.object(traffic, "SMALL", SMALL):
            trainer = Trainer(config, world, plan, latent_scale=0.18215)
        trainer.start()
        batches = cycle([random_batch(shape, plan.micro_batch, i) for i in range(plan.micro_steps)])
        for step in range(3):
            trainer.take(batches, step)
        with Collectives() as seen:
            trainer.take(batches, 3)
        return seen
    finally:
        dist.stop()


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_steps", [1, 4])
def test_collectives_follow_the_formula(
    data: Path, tmp_path: Path, stage: int, precision: str, micro_steps: int
) -> None:
    config = jobs.small_config(tmp_path, data, "DiT-Ti/2", zero_stage=stage, precision=precision)
    config = config.model_copy(update={"global_batch": 2 * WORLD * micro_steps})
    with patch.object(traffic, "SMALL", SMALL):
        expected = traffic.traffic(traffic.sizes(config.model), config.engine, memory.plan_of(config, WORLD))
    for seen in run(WORLD, count_step, config):
        print(f"ZeRO-{stage} {precision}, {micro_steps} micro-steps: {dict(seen.calls)} {dict(seen.bytes)}")
        assert seen.bytes["allreduce_"] == pytest.approx(expected.summed, rel=0.01, abs=SMALL_SUMS_BYTES)
        assert seen.bytes["_reduce_scatter_base_"] == pytest.approx(expected.scattered, rel=0.01)
        assert seen.bytes["_allgather_base_"] == pytest.approx(expected.gathered, rel=0.01)
        numbers = NUM_SUMS_OF_NUMBERS.get((stage, precision), 2)
        assert seen.calls["allreduce_"] == numbers + {1: 1, 2: micro_steps, 3: 0}[stage]
        assert seen.calls["_reduce_scatter_base_"] == {1: 0, 2: 0, 3: micro_steps}[stage]
        if stage < 3:
            assert seen.calls["_allgather_base_"] == 1


def test_the_traffic_of_the_large_model() -> None:
    config = TrainConfig(model=ModelConfig(name="DiT-XL/2"))
    sizes = traffic.sizes(config.model)
    assert sum(sizes) == 675_129_632 - 256 * 1152  # without the position embedding

    def sent(stage: int, micro_steps: int, world: int = 8) -> float:
        plan = batch_plan(32 * world * micro_steps, 32, world)
        engine = config.engine.model_copy(update={"zero_stage": stage, "precision": "bf16"})
        return traffic.traffic(sizes, engine, plan).sent / 1e9

    assert sent(1, 1) == sent(2, 1) == pytest.approx(0.6748 * (2 * 4 + 2) * 7 / 8, rel=1e-3)
    assert sent(1, 4) == sent(1, 1)
    assert sent(2, 4) == pytest.approx(0.6748 * (4 * 2 * 4 + 2) * 7 / 8, rel=1e-3)
    assert sent(3, 1) == pytest.approx(0.6748 * (4 + 2) * 7 / 8, rel=1e-3)
    assert sent(1, 1, world=1) == 0
