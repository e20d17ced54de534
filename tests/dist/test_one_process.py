"""A single process trains without ZeRO: the same bits, no collectives, and no copies of gradients."""

from collections import Counter
from itertools import cycle
from pathlib import Path

import pytest

from benchmarks.train_step import random_batch
from dit_scale import dist
from dit_scale.checkpoint.partition import MASTER
from dit_scale.config import TrainConfig
from dit_scale.models.zoo import shape_of
from dit_scale.train import memory
from dit_scale.train.trainer import Trainer
from tests.support.collectives import Collectives
from tests.support.operators import Operators
from tests.support.ranks import jobs
from tests.support.ranks.processes import run

pytestmark = pytest.mark.dist

MICRO_STEPS = 4


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_process_computes_what_zero_computes(
    data: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    config = jobs.small_config(tmp_path / "alone", data, zero_stage=stage, precision=precision)
    with_zero = config.model_copy(update={"run": str(tmp_path / "zero")})
    assert run(1, jobs.train, config, True) == run(1, jobs.train_sharded, with_zero, True) == [0]
    alone, zero = jobs.losses(config), jobs.losses(with_zero)
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(alone, zero, strict=True))
    print(f"ZeRO-{stage} {precision}: losses differ by at most {worst:.1e}")
    if stage < 3:
        assert [row["loss"] for row in alone] == [row["loss"] for row in zero]
    # ZeRO-3 adds micro-batches in another order, and in bf16 it rounds each sum.
    assert worst < (1e-6 if precision == "fp32" else 2e-3)


def test_clipping_computes_what_zero_computes(data: Path, tmp_path: Path) -> None:
    config = jobs.small_config(tmp_path / "alone", data)
    optimizer = config.optimizer.model_copy(update={"clip_grad_norm": 0.05})
    config = config.model_copy(update={"optimizer": optimizer})
    with_zero = config.model_copy(update={"run": str(tmp_path / "zero")})
    assert run(1, jobs.train, config, True) == run(1, jobs.train_sharded, with_zero, True) == [0]
    for alone, zero in zip(jobs.losses(config), jobs.losses(with_zero), strict=True):
        assert alone["grad_norm"] > 1
        assert alone["loss"] == pytest.approx(zero["loss"], rel=1e-6)


def count_step(config: TrainConfig) -> tuple[Counter[str], Counter[str], bool]:
    """Count the operators of a step's accumulation and of its update, and check that it sends nothing.

    Returns also whether the weights are the masters.
    """
    world = dist.start(config.engine)
    try:
        plan, shape = memory.plan_of(config, world.size), shape_of(config.model)
        trainer = Trainer(config, world, plan, latent_scale=0.18215)
        trainer.start()
        batches = cycle([random_batch(shape, plan.micro_batch, i) for i in range(plan.micro_steps)])
        trainer.take(batches, 0)
        with Collectives() as sent, Operators() as accumulation:
            sums = trainer.accumulate(batches)
        with sent:
            vote = world.start_vote(True, False)
        with sent, Operators() as update:
            trainer.update(sums, 1)
        assert vote.result() == (True, False)
        assert not sent.calls
        master = trainer.engine.owned[0].buffers[MASTER].untyped_storage().data_ptr()
        weights = {p.untyped_storage().data_ptr() for p in trainer.engine.module.parameters()}
        return accumulation.called, update.called, weights == {master}
    finally:
        dist.stop()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_neither_communicates_nor_copies_gradients(
    data: Path, tmp_path: Path, precision: str
) -> None:
    config = jobs.small_config(tmp_path, data, precision=precision)
    config = config.model_copy(update={"global_batch": 2 * MICRO_STEPS})
    ((accumulation, update, aliased),) = run(1, count_step, config)
    print(f"{precision}: {sum(update.values())} operators in an update, {dict(update)}")
    casts = int(precision == "bf16")
    assert aliased == (not casts)
    assert update["aten::_foreach_norm.Scalar"] == update["aten::_fused_adamw_"] == 1
    assert update["aten::copy_"] == casts  # bf16 weights, all at once
    assert update["aten::cat"] == 1  # the row for the meters
    assert not {name for name in update if name.startswith("aten::clone")}
    assert accumulation["aten::_foreach_copy_"] == casts
    assert accumulation["aten::_foreach_add_.List"] == casts * (MICRO_STEPS - 1)
