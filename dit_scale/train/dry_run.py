"""`train --dry-run`: prints the resolved configuration, parameters, FLOPs and memory; starts nothing."""

from dit_scale.config import TrainConfig, dump
from dit_scale.data.batch_plan import BatchPlan
from dit_scale.models.zoo import (
    FLOPS_PER_MAC,
    TRAINING_FORWARDS,
    forward_macs,
    num_parameters,
    shape_of,
)
from dit_scale.train.memory import GIB, Memory, estimate, plan_of, sharding
from dit_scale.train.traffic import Traffic, sizes, traffic

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "ema",
    "activations",
    "backward",
    "communication",
    "evaluation",
    "context",
)
"""Fields of `Memory` that add up to its bytes on the device."""


def report(config: TrainConfig, world: int) -> None:
    """Describe a run on `world` processes. Raises ConfigError when it is impossible."""
    shape = shape_of(config.model)
    plan = plan_of(config, world)
    flops = FLOPS_PER_MAC * TRAINING_FORWARDS * forward_macs(shape)
    print(dump(config))
    print(
        f"model            {shape.name} at {shape.image_size} px, {shape.tokens} tokens, {shape.conditioning}"
    )
    print(f"parameters       {num_parameters(shape):,} trainable")
    print(f"forward          {forward_macs(shape) / 1e9:,.3f} GMACs per image")
    print(f"training step    {flops / 1e9:,.2f} GFLOP per image")
    _report_batch(plan)
    _report_traffic(traffic(sizes(config.model), config.engine, plan))
    _report_memory(config, world, estimate(config, shape, plan))


def _report_batch(plan: BatchPlan) -> None:
    shares = [len(plan.rank_samples(rank)) for rank in range(plan.world)]
    print(
        f"batch            {plan.global_batch} samples on {plan.world} processes: "
        f"{plan.micro_steps} micro-steps of {plan.micro_batch} each"
    )
    print(f"share of a rank  {min(shares)} to {max(shares)} samples")
    print(f"loss scale       {plan.loss_scale:.6g}")


def _report_traffic(step: Traffic) -> None:
    print(
        f"traffic          {step.sent / 1e9:.2f} GB sent by each process per step: "
        f"{(step.summed + step.scattered) / 1e9:.2f} GB of gradients reduced, "
        f"{step.gathered / 1e9:.2f} GB of weights gathered"
    )


def _report_memory(config: TrainConfig, world: int, memory: Memory) -> None:
    limit = f" of {config.engine.memory_gib:g} GiB" if config.engine.memory_gib else ""
    print(
        f"memory           about {memory.on_device / GIB:.2f} GiB{limit} per process "
        f"{sharding(config.engine.zero_stage, world)}:"
    )
    for part in PARTS:
        print(f"  {part:<14} {getattr(memory, part) / GIB:8.3f} GiB")
    print(f"host snapshot    {memory.snapshot / GIB:8.3f} GiB per process")
