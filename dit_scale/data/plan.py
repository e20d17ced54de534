"""How a step's samples are split over ranks and micro-steps: the one place that knows the world size.

Plain arithmetic, no torch. `train --dry-run` prints it.
"""

from dataclasses import dataclass

from dit_scale.data.order import rank_slice
from dit_scale.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """One global batch, worked through in the same number of micro-steps on every rank."""

    global_batch: int
    world: int
    micro_batch: int
    """Samples per process in one forward pass; a part that is short is filled up at weight 0."""
    micro_steps: int
    """Forward and backward passes per optimizer step."""

    def rank_samples(self, rank: int) -> range:
        """The indices within the global batch that a rank takes."""
        return rank_slice(self.global_batch, rank, self.world)

    @property
    def loss_scale(self) -> float:
        """Gradients are averaged over ranks: a sum over a rank's samples times this gives the global mean."""
        return self.world / self.global_batch


def batch_plan(global_batch: int, micro_batch: int, world: int) -> BatchPlan:
    """Split a global batch: as few micro-steps as `micro_batch` allows, then as even as they get.

    Raises ConfigError when some process would have no sample.
    """
    if global_batch < world:
        raise ConfigError(
            f"global_batch={global_batch} is smaller than the {world} processes: start fewer, or raise it"
        )
    share = -(-global_batch // world)
    micro_steps = -(-share // micro_batch)
    return BatchPlan(global_batch, world, -(-share // micro_steps), micro_steps)
