"""Jobs for the tests of the guard: a step that fails in every possible way, and what it leaves behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from dit_scale import dist
from dit_scale.checkpoint.partition import MASTER, OPTIMIZER_KINDS
from dit_scale.checkpoint.reader import fill
from dit_scale.config import TrainConfig
from dit_scale.data.batch_plan import batch_plan
from dit_scale.data.loader import Loader
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.data.shards import LatentDataset
from dit_scale.models import dit
from dit_scale.train import zero
from dit_scale.train.trainer import Trainer
from tests.support.ranks import jobs

BAD_SAMPLE = 4
"""One of the 7 samples of a step: on the last of 2 ranks, on the middle one of 3."""

Bits = dict[tuple[str, str, int], torch.Tensor]
"""(kind, parameter, start) => a copy of what this rank owns; padding has no defined value."""

Harm = Callable[[MicroBatch, torch.Tensor], MicroBatch]
"""(batch, mask of the bad sample (B,)) => what the step gets instead."""


def no_harm(batch: MicroBatch, bad_B: torch.Tensor) -> MicroBatch:
    return batch


def nan_in_the_latent(batch: MicroBatch, bad_B: torch.Tensor) -> MicroBatch:
    return replace(batch, moments_B2CHW=batch.moments_B2CHW.masked_fill(bad_B.view(-1, 1, 1, 1), torch.nan))


def heavy_sample(batch: MicroBatch, bad_B: torch.Tensor) -> MicroBatch:
    """Make a step whose loss and gradient are finite and far above their means."""
    return replace(batch, weight_B=batch.weight_B.masked_fill(bad_B, 1000.0))


@contextmanager
def infinite_gradient(trainer: Trainer) -> Iterator[None]:
    """Damage one parameter's gradient on this rank; the loss stays the same."""
    bias = trainer.engine.module.final_layer.linear.bias
    handle = bias.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    yield
    handle.remove()


class Outcome(NamedTuple):
    """What one rank observed."""

    rows: list[list[float]]
    """A good step, a NaN, an infinite gradient, a spike, and a good step again."""
    guard: dict[str, float]
    weights: bytes
    """The weights of the complete model, as the forward pass reads them."""
    groups: int
    """Calls of the optimizer in a step."""


def pass_over_failures(
    config: TrainConfig, sub_group_elements: int = 10**9, rounding: float = 0.0
) -> Outcome:
    """Take a step, three that fail, and a good one, which must be what it is without them.

    At ZeRO-3 the optimizer is called once for every `sub_group_elements`. Averages move as torch.lerp moves
    them, up to the relative difference `rounding`.
    """
    original = zero.deepspeed_config

    def with_sub_groups(*args: Any) -> dict[str, Any]:
        tree = original(*args)
        tree["zero_optimization"]["sub_group_size"] = sub_group_elements
        return tree

    with (
        patch.object(dit, "initialise_weights", jobs.randomise),
        patch.object(zero, "deepspeed_config", with_sub_groups),
    ):
        world = dist.start(config.engine)
        try:
            return _pass_over_failures(config, world, rounding)
        finally:
            dist.stop()


def _pass_over_failures(config: TrainConfig, world: dist.World, rounding: float) -> Outcome:
    import deepspeed

    plan = batch_plan(config.global_batch, config.engine.micro_batch, world.size)
    dataset = LatentDataset.open(config.data.url)
    trainer = Trainer(config, world, plan, dataset.info.vae.scale)
    trainer.start()

    def take(number: int, harm: Harm = no_harm) -> list[float]:
        loader = Loader(dataset, config.data, plan, rank=world.rank, seed=config.seed, first_step=number)
        bad = number * config.global_batch + BAD_SAMPLE
        batches = (harm(batch, (batch.position_B == bad) & (batch.weight_B > 0)) for batch in loader)
        row: list[float] = trainer.take(batches, number).tolist()
        loader.close()
        return row

    def take_failing(harm: Harm = no_harm) -> list[float]:
        before, updates_before = owned_bits(trainer), updates(trainer)
        row = take(1, harm)
        after = owned_bits(trainer)
        assert same_optimizer_state(after, before)
        assert updates(trainer) == updates_before
        for kind, *where in before:
            if kind == MASTER:
                masters, averages = before[MASTER, *where], before["ema.constant", *where]
                torch._foreach_lerp_((averages,), (masters,), 1.0 - 0.9)
                torch.testing.assert_close(after["ema.constant", *where], averages, rtol=rounding, atol=0.0)
        return row

    first = take(0)
    start, guard = owned_bits(trainer), trainer.guard.state()
    alone = take(1)
    end = owned_bits(trainer)

    kinds = trainer.engine.owned[0].buffers
    fill(trainer.engine.owned, kinds, lambda kind, parameter, first, _: start[kind, parameter, first])
    trainer.resume(guard)
    failed = [take_failing(nan_in_the_latent)]
    with infinite_gradient(trainer) if world.rank == world.size - 1 else nullcontext():
        failed.append(take_failing())
    failed.append(take_failing(heavy_sample))
    after = take(1)
    assert after == alone
    assert same_optimizer_state(owned_bits(trainer), end)
    assert updates(trainer) == {2.0}
    parameters = list(trainer.engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        weights = torch.cat([parameter.detach().float().flatten() for parameter in parameters])
    return Outcome(
        [first, *failed, after],
        trainer.guard.state(),
        weights.cpu().numpy().tobytes(),
        groups=len(trainer.engine.owned),
    )


def owned_bits(trainer: Trainer) -> Bits:
    return {
        (kind, slice_.parameter, slice_.start): buffer.detach()[slice_.offset :][: slice_.length].clone()
        for partition in trainer.engine.owned
        for kind, buffer in partition.buffers.items()
        for slice_ in partition.slices
    }


def same_optimizer_state(got: Bits, expected: Bits) -> bool:
    assert set(got) == set(expected)
    return all(torch.equal(got[key], expected[key]) for key in got if key[0] in OPTIMIZER_KINDS)


def updates(trainer: Trainer) -> set[float]:
    """Return AdamW's step count of all partitions."""
    state = trainer.engine._optimizer.state
    return {state[master]["step"].item() for master in trainer.engine._sharding.masters}
