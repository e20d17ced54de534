"""What the samples of a step add up to over all ranks: one vector, so that one all-reduce is enough.

    0 to 2           sums of loss, mse and vb
    3 to 6, 7 to 10  by quarter of the timesteps: sum of the losses, number of samples
    11 + rank        largest loss of a sample of this rank, 0 on all other ranks

A sum of maxima that do not overlap loses nothing, so the maximum of all ranks is exact.

Shapes: B samples, T timesteps, Q quarters.
"""

import torch
from torch import Tensor

from dit_scale.dist import World
from dit_scale.telemetry.meters import QUARTERS
from dit_scale.train.objective import SampleLosses

LOSSES = 3
_BY_QUARTER = slice(LOSSES, LOSSES + 2 * QUARTERS)
_MAXIMA = LOSSES + 2 * QUARTERS


class SampleSums:
    """Adds up what the samples of a step measured, on the device. Samples count by their weight."""

    def __init__(self, num_timesteps: int, world: World) -> None:
        self._world = world
        quarter_T = torch.arange(num_timesteps) * QUARTERS // num_timesteps
        one_hot_TQ = torch.nn.functional.one_hot(quarter_T, QUARTERS)
        self._one_hot_TQ = one_hot_TQ.to(world.device, torch.float32)

    def start(self) -> Tensor:
        """Return the vector of a step without samples, fp32 (11 + world,) on the device."""
        return torch.zeros(_MAXIMA + self._world.size, device=self._world.device)

    @torch.no_grad()
    def add(self, vector: Tensor, by_sample: SampleLosses, sums: Tensor, weight_B: Tensor) -> None:
        """Add the samples of a micro-batch in place; `sums` is `by_sample.sums(weight_B)`."""
        vector[:LOSSES].add_(sums)
        weighted_B = by_sample.total_B * weight_B
        values_2B = torch.stack((weighted_B, weight_B))
        # A product and a sum in fp32: as a matrix product, CUDA might round the losses to TF32.
        by_quarter_2QB = values_2B[:, None] * self._one_hot_TQ[by_sample.t_B].T
        vector[_BY_QUARTER].add_(by_quarter_2QB.sum(-1).flatten())
        largest = vector[_MAXIMA + self._world.rank]
        torch.maximum(largest, weighted_B.amax(), out=largest)

    def over_ranks(self, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum over all ranks => sums of the losses (3,), largest loss (), sums by quarter (2 Q,)."""
        total = self._world.sum(vector)
        return total[:LOSSES], total[_MAXIMA:].amax(), total[_BY_QUARTER]
