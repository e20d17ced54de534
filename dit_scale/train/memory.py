"""What a process holds in memory at a ZeRO stage, estimated, and the micro-batch that fits."""

from dataclasses import dataclass

from dit_scale.config import TrainConfig
from dit_scale.data.batch_plan import BatchPlan, batch_plan
from dit_scale.errors import ConfigError
from dit_scale.models.zoo import Shape, num_parameters, shape_of

GIB = 2**30

_SAVED_WIDTHS_PER_BLOCK = 18
"""Saved for backward, in widths per token: block input, two normalised and two modulated inputs (5),
qkv (3), attention output and projection (2), MLP hidden before and after GELU (8)."""


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one process; on its device unless it says so."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    snapshot: int
    """On the host: a copy of all that the process owns, master weights, moments and averages."""

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


def estimate(config: TrainConfig, shape: Shape, plan: BatchPlan) -> Memory:
    """Bytes held between the forward and the backward pass, without the allocator's slack.

    Weights and activations in the chosen precision (fp32 while it is `auto`), gradients summed in fp32,
    master weights and two moments and each EMA in fp32 on their owner; attention keeps no score matrix.
    """
    element = 2 if config.engine.precision == "bf16" else 4
    whole = num_parameters(shape)
    owned = -(-whole // plan.world)
    stage = config.engine.zero_stage
    token_widths = plan.micro_batch * shape.tokens * shape.width
    return Memory(
        weights=element * (owned if stage == 3 else whole),
        gradients=4 * (owned if stage >= 2 else whole),
        optimizer=12 * owned,
        ema=4 * owned * len(config.ema),
        activations=element * token_widths * _SAVED_WIDTHS_PER_BLOCK * shape.depth,
        snapshot=4 * owned * (3 + len(config.ema)),
    )


def plan_of(config: TrainConfig, world: int) -> BatchPlan:
    """All that depends on the number of processes. Raises ConfigError when there can be no such run."""
    micro_batch = micro_batch_for(config, shape_of(config.model), world)
    return batch_plan(config.global_batch, micro_batch, world)


def micro_batch_for(config: TrainConfig, shape: Shape, world: int) -> int:
    """The largest micro-batch, `engine.micro_batch` at most, that fits into `engine.memory_gib`.

    Raises ConfigError when not even one sample at a time does.
    """
    engine = config.engine
    if not engine.memory_gib:
        return engine.micro_batch
    for micro_batch in range(engine.micro_batch, 0, -1):
        plan = batch_plan(config.global_batch, micro_batch, world)
        needed_gib = estimate(config, shape, plan).total / GIB
        if needed_gib <= engine.memory_gib:
            return micro_batch
    remedy = "" if engine.zero_stage == 3 else "engine.zero_stage=3, "
    raise ConfigError(
        f"{shape.name} at {shape.image_size} px, one sample at a time, needs about {needed_gib:.2f} GiB on "
        f"each of {world} processes at ZeRO-{engine.zero_stage}, and engine.memory_gib is "
        f"{engine.memory_gib:g}: use {remedy}more processes, or devices with more memory"
    )
