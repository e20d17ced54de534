"""What a process holds in memory at a ZeRO stage: an estimate for `train --dry-run`."""

from dataclasses import dataclass

from dit_scale.config import TrainConfig
from dit_scale.data.plan import BatchPlan
from dit_scale.models.zoo import Shape, num_parameters

_SAVED_WIDTHS_PER_BLOCK = 18
"""Saved for backward, in widths per token: block input, two normalised and two modulated inputs (5),
qkv (3), attention output and projection (2), MLP hidden before and after GELU (8)."""


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


def estimate(config: TrainConfig, shape: Shape, plan: BatchPlan) -> Memory:
    """Bytes held between the forward and the backward pass, without the allocator's slack.

    Weights and activations in the chosen precision, gradients summed in fp32, master weights and two
    moments and each EMA in fp32 on their owner; attention keeps no score matrix.
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
    )
