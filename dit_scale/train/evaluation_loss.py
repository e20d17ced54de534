"""The held-out loss: the training objective on samples that training never reads, with fixed draws.

Every draw is keyed by the sample's id and the seed of the evaluation, so the losses of two steps, two kinds
of weights or two runs differ by their weights alone. No label is dropped, and no image mirrored.

Shapes: B samples of a tile, C latent channels, H latent height, W latent width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_scale import rng
from dit_scale.data.shards import LATENT_DTYPE, LatentDataset
from dit_scale.diffusion.gaussian import q_sample
from dit_scale.diffusion.loss import hybrid_loss
from dit_scale.diffusion.schedule import Schedule
from dit_scale.errors import DataError
from dit_scale.rng import Purpose
from dit_scale.train.objective import Predict

DRAWS = 4
"""Timesteps per sample. The d-th lies in the d-th of as many equal parts of the diffusion."""
COLUMNS = ("loss", "mse", "vb")
"""The hybrid loss and its two terms."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Computes sums of the losses over tiles of the held-out samples."""

    dataset: LatentDataset
    ids: NDArray[np.int64]
    """The held-out samples, ascending."""
    schedule: Schedule
    """The schedule of training, on the device of the model."""
    seed: int
    tile: int
    """Samples in a forward pass; the last tile is padded."""
    skip_damaged: bool
    """Whether a sample with a wrong checksum is left out; else it is an error."""

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return -(-len(self.ids) // self.tile)

    @torch.no_grad()
    def tile_sums(self, predict: Predict, number: int) -> NDArray[np.float64]:
        """Return the sums of `COLUMNS` over the samples and draws of a tile, and how many these are.

        Raises DataError for a damaged sample, unless these are skipped.
        """
        first = number * self.tile
        real = self.ids[first : first + self.tile]
        ids = np.pad(real, (0, self.tile - len(real)), mode="edge")
        moments_B2CHW = np.empty((self.tile, *self.dataset.info.latent_shape[1:]), LATENT_DTYPE)
        labels_B, damaged = self.dataset.read_views(ids, np.zeros_like(ids), moments_B2CHW)
        if damaged and not self.skip_damaged:
            raise DataError(f"{next(iter(damaged.values()))}, or set data.damaged=quarantine to leave it out")
        counts_B = (np.arange(self.tile) < len(real)) & ~np.isin(ids, list(damaged))
        moments_B2CHW[~counts_B] = 0
        device = self.schedule.timesteps.device
        y_B, id_B = torch.from_numpy(labels_B).to(device), torch.from_numpy(ids).to(device)
        sums = np.zeros(len(COLUMNS) + 1)
        for draw in range(DRAWS):
            losses_3B = self._losses(predict, torch.from_numpy(moments_B2CHW).to(device), y_B, id_B, draw)
            sums[:-1] += losses_3B.double().cpu().numpy()[:, counts_B].sum(axis=1)
            sums[-1] += counts_B.sum()
        return sums

    def _losses(
        self, predict: Predict, moments_B2CHW: Tensor, y_B: Tensor, id_B: Tensor, draw: int
    ) -> Tensor:
        """Return `COLUMNS` of each sample for its draw of this number, (3, B) fp32."""
        mean_BCHW, std_BCHW = moments_B2CHW.float().chunk(2, dim=1)
        shape = tuple(mean_BCHW.shape[1:])
        posterior_BCHW = rng.normals(self.seed, Purpose.HELD_OUT_POSTERIOR, id_B, shape, stream=draw)
        noise_BCHW = rng.normals(self.seed, Purpose.HELD_OUT_NOISE, id_B, shape, stream=draw)
        z_BCHW = (mean_BCHW + std_BCHW * posterior_BCHW) * self.dataset.info.vae.scale
        t_B = timesteps(self.seed, id_B, draw, len(self.schedule))
        x_BCHW = q_sample(self.schedule, z_BCHW, t_B, noise_BCHW)
        loss = hybrid_loss(
            self.schedule,
            predict(x_BCHW, t_B, y_B),
            x_start_BCHW=z_BCHW,
            x_t_BCHW=x_BCHW,
            noise_BCHW=noise_BCHW,
            t_B=t_B,
        )
        return torch.stack(loss)


def timesteps(seed: int, id_B: Tensor, draw: int, num_timesteps: int) -> Tensor:
    """Return the timestep of each sample for its draw of this number, int64: floor(T (u + draw) / DRAWS)."""
    u_B = rng.uniforms(seed, Purpose.HELD_OUT_TIMESTEP, id_B)
    return ((u_B + draw) * (num_timesteps / DRAWS)).long()


def means(tile_sums: list[NDArray[np.float64]]) -> dict[str, float | None]:
    """Return the means of `COLUMNS` from the sums of all tiles; None if no sample could be read."""
    *sums, count = np.sum(tile_sums, axis=0).tolist()
    return {name: total / count if count else None for name, total in zip(COLUMNS, sums, strict=True)}
