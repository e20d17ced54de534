"""Estimated memory of a process at each ZeRO stage, and the largest micro-batch that fits."""

from dataclasses import dataclass

from dit_scale.config import TrainConfig
from dit_scale.data.batch_plan import BatchPlan, batch_plan
from dit_scale.errors import ConfigError
from dit_scale.models.zoo import Shape, num_parameters, shape_of

GIB = 2**30

_SAVED_WIDTHS_PER_BLOCK = 18
"""What an adaLN block saves for its backward pass, in model widths per token: two residual inputs, two
normalized and two modulated inputs (6), q, k and v (3), attention output (1), MLP hidden before and after
GELU (8)."""


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one process, on its device unless stated otherwise."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    snapshot: int
    """On the host: a copy of the masters, moments and averages that the process owns."""

    @property
    def total(self) -> int:
        """All bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


def estimate(config: TrainConfig, shape: Shape, plan: BatchPlan) -> Memory:
    """Bytes held between the forward and the backward pass, without the allocator's overhead.

    Assumes weights and activations in the configured precision (fp32 for `auto`), gradients in fp32, and
    fp32 masters, two moments and EMA profiles on their owner. Attention saves no score matrix.
    """
    element = 2 if config.engine.precision == "bf16" else 4
    total = num_parameters(shape)
    owned = -(-total // plan.world)
    stage = config.engine.zero_stage
    token_widths = plan.micro_batch * shape.tokens * shape.width
    return Memory(
        weights=element * (owned if stage == 3 else total),
        gradients=4 * (owned if stage >= 2 else total),
        optimizer=12 * owned,
        ema=4 * owned * len(config.ema),
        activations=element * token_widths * _SAVED_WIDTHS_PER_BLOCK * shape.depth,
        snapshot=4 * owned * (3 + len(config.ema)),
    )


def sharding(stage: int, world: int) -> str:
    """How a model is shared by this many processes, in words."""
    return f"at ZeRO-{stage}" if world > 1 else "in one process"


def plan_of(config: TrainConfig, world: int) -> BatchPlan:
    """Everything that depends on the world size. Raises ConfigError when no such run is possible."""
    micro_batch = micro_batch_for(config, shape_of(config.model), world)
    return batch_plan(config.global_batch, micro_batch, world)


def micro_batch_for(config: TrainConfig, shape: Shape, world: int) -> int:
    """The largest micro-batch up to `engine.micro_batch` that fits into `engine.memory_gib`.

    Raises ConfigError when even a micro-batch of 1 does not fit.
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
        f"{shape.name} at {shape.image_size} px needs about {needed_gib:.2f} GiB per process with a "
        f"micro-batch of 1 on {world} processes at ZeRO-{engine.zero_stage}, but engine.memory_gib is "
        f"{engine.memory_gib:g}: use {remedy}more processes, or devices with more memory"
    )
