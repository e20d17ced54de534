"""Reads the samples at given positions of a run.

Shapes: B micro-batch, C latent channels, H and W latent sides.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from dit_scale import rng
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.data.order import I64, Order
from dit_scale.data.quarantine import Quarantine
from dit_scale.data.shards import LATENT_DTYPE, LatentDataset
from dit_scale.rng import Purpose


class SampleReader:
    """Reads the samples at given positions of a run, replacing quarantined ones."""

    def __init__(
        self, dataset: LatentDataset, order: Order, seed: int, flip: bool, quarantine: Quarantine
    ) -> None:
        self.order, self.quarantine = order, quarantine
        self._dataset, self._seed = dataset, seed
        self._num_views = 2 if flip else 1

    def draws(self, positions: I64) -> tuple[I64, I64]:
        """Return the sample id and the view at each position, both of the same shape."""
        flat = torch.from_numpy(positions.reshape(-1))
        views = rng.integers(self._seed, Purpose.VIEW, flat, self._num_views).numpy()
        return self.order.ids(positions), views.reshape(positions.shape)

    def micro_batch(self, positions_B: I64, ids_B: I64, views_B: I64, num_real: int) -> MicroBatch:
        """Read the samples with these ids; those from `num_real` on are padding."""
        moments_B2CHW, labels_B = self._read(ids_B, views_B)
        return MicroBatch(
            torch.from_numpy(moments_B2CHW),
            torch.from_numpy(labels_B),
            torch.from_numpy(positions_B),
            (torch.arange(len(positions_B)) < num_real).float(),
        )

    def _read(self, ids_B: I64, views_B: I64) -> tuple[NDArray[np.float16], I64]:
        """Read moments and labels, replacing damaged samples."""
        ids_B = self.quarantine.replace(ids_B)
        moments_B2CHW = np.empty((len(ids_B), *self._dataset.info.latent_shape[1:]), LATENT_DTYPE)
        labels_B, damaged = self._dataset.read_views(ids_B, views_B, moments_B2CHW)
        if damaged:
            self.quarantine.add(damaged)
            rows = np.isin(ids_B, list(damaged))
            moments_B2CHW[rows], labels_B[rows] = self._read(ids_B[rows], views_B[rows])
        return moments_B2CHW, labels_B
