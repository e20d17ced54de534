"""How a step's samples are split over ranks and micro-steps: the one place that knows the world size.

Plain arithmetic, no torch. `train --dry-run` prints it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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

    def indices(self, rank: int, first_step: int, num_steps: int = 1) -> NDArray[np.int64]:
        """Indices of a rank's samples since the start of the run, int64 (steps, micro-steps, micro-batch).

        Behind a rank's last sample of a step stand fillers, which repeat it.
        """
        mine = self.rank_samples(rank)
        places = np.minimum(np.arange(self.micro_steps * self.micro_batch), len(mine) - 1) + mine.start
        steps = np.arange(first_step, first_step + num_steps, dtype=np.int64)
        return (steps[:, None] * self.global_batch + places).reshape(-1, self.micro_steps, self.micro_batch)

    def num_real(self, rank: int) -> list[int]:
        """How many samples of each micro-step of a rank are no fillers."""
        starts = np.arange(self.micro_steps) * self.micro_batch
        return np.clip(len(self.rank_samples(rank)) - starts, 0, self.micro_batch).tolist()

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
