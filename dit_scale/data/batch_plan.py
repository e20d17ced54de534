"""How the samples of a step are split over ranks and micro-steps: the only place that knows the world size.

Plain arithmetic, no torch. `train --dry-run` prints it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_scale.data.order import rank_slice
from dit_scale.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """A global batch, processed in the same number of micro-steps on every rank."""

    global_batch: int
    world: int
    micro_batch: int
    """Samples per rank in one forward pass; short micro-batches are padded at weight 0."""
    micro_steps: int
    """Forward and backward passes per optimizer step."""

    def rank_samples(self, rank: int) -> range:
        """Return the indices within the global batch that belong to a rank."""
        return rank_slice(self.global_batch, rank, self.world)

    def indices(self, rank: int, first_step: int, num_steps: int = 1) -> NDArray[np.int64]:
        """Return a rank's sample indices since the start of the run, int64 (steps, micro-steps, micro-batch).

        The last sample of a step is repeated as padding.
        """
        mine = self.rank_samples(rank)
        in_step = np.minimum(np.arange(self.micro_steps * self.micro_batch), len(mine) - 1) + mine.start
        steps = np.arange(first_step, first_step + num_steps, dtype=np.int64)
        return (steps[:, None] * self.global_batch + in_step).reshape(-1, self.micro_steps, self.micro_batch)

    def num_real(self, rank: int) -> list[int]:
        """Return the number of samples without padding in each micro-step of a rank."""
        starts = np.arange(self.micro_steps) * self.micro_batch
        return np.clip(len(self.rank_samples(rank)) - starts, 0, self.micro_batch).tolist()

    @property
    def loss_scale(self) -> float:
        """Factor that turns a rank's sum over samples into the global mean, after averaging over ranks."""
        return self.world / self.global_batch


def batch_plan(global_batch: int, micro_batch: int, world: int) -> BatchPlan:
    """Split a global batch into as few micro-steps as `micro_batch` allows, of nearly equal size.

    Raises ConfigError if a rank would have no sample.
    """
    if global_batch < world:
        raise ConfigError(
            f"global_batch={global_batch} is smaller than the world size of {world}: start fewer processes, "
            "or raise it"
        )
    share = -(-global_batch // world)
    micro_steps = -(-share // micro_batch)
    return BatchPlan(global_batch, world, -(-share // micro_steps), micro_steps)
