"""Embeddings of patches, positions, timesteps and classes.

Shapes: B batch, C latent channels, H and W latent height and width, T tokens, D width,
F = 256 channels of the timestep sinusoid.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dit_scale.models.zoo import TIMESTEP_CHANNELS, TIMESTEP_DIVISORS


class PatchEmbed(nn.Module):
    """Maps non-overlapping patches to tokens with one linear layer (Section 3.2, "Patchify")."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW => x_BTD, tokens row by row, channels contiguous in memory."""
        # The residual stream keeps this layout through all blocks; if it were transposed, every layer
        # would copy its input.
        return self.proj(x_BCHW).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """Embeds timesteps: a sinusoid, then a two-layer MLP."""

    def __init__(self, width: int, divisor: int = TIMESTEP_DIVISORS["paper"]) -> None:
        super().__init__()
        self.divisor = divisor
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        """Timesteps of the unrespaced diffusion, integer or float => t_BD in `dtype`, the weights' type."""
        return self.mlp(timestep_sinusoid(t_B, self.divisor).to(dtype))


class LabelEmbedder(nn.Module):
    """An embedding table with a row per class and a last row for the null class; callers drop labels."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        # `initialise_weights` fills this. nn.Embedding would draw random numbers, and on the meta device
        # that imports torch's compiler.
        self.embedding_table = nn.Embedding.from_pretrained(torch.empty(num_classes + 1, width), freeze=False)

    def forward(self, y_B: Tensor) -> Tensor:
        """Class numbers, 0 to num_classes (the null class) => y_BD."""
        return self.embedding_table(y_B)


def timestep_sinusoid(t_B: Tensor, divisor: int = TIMESTEP_DIVISORS["paper"]) -> Tensor:
    """Sinusoidal features of timesteps => f_BF fp32, cosines first (Vaswani et al. 2017, Section 3.5).

    Frequency i of F / 2 is 10000**(-i / divisor). Always fp32, because bf16 cannot tell neighbouring
    timesteps near 1000 apart.
    """
    numbers = torch.arange(TIMESTEP_CHANNELS // 2, dtype=torch.float32, device=t_B.device)
    # Multiplied before it is divided, as in diffusers, so that both round alike.
    frequencies = torch.exp(-math.log(10000.0) * numbers / divisor)
    angles = t_B.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def sincos_table(width: int, grid: int) -> NDArray[np.float64]:
    """Fixed position embedding of a square grid => (grid * grid, width) float64.

    The first half of the channels encodes the column, the second half the row, each as sines then
    cosines with frequencies 10000**(-i / (width / 4)) (Vaswani et al. 2017, Section 3.5, in 2D).
    """
    num = width // 4
    frequencies = 10000.0 ** (-np.arange(num, dtype=np.float64) / num)
    angles = np.arange(grid, dtype=np.float64)[:, None] * frequencies
    line = np.concatenate((np.sin(angles), np.cos(angles)), axis=1)
    columns = np.tile(line, (grid, 1))
    rows = np.repeat(line, grid, axis=0)
    return np.concatenate((columns, rows), axis=1)


def sincos_pos_embed(width: int, grid: int) -> Tensor:
    """Return the table as pos_embed_1TD: computed in float64, rounded once to fp32."""
    return torch.from_numpy(sincos_table(width, grid).astype(np.float32))[None]


def add_positions(x_BTD: Tensor, pos_embed_1TD: Tensor) -> Tensor:
    """Add positions in fp32 => x_BTD in the type of x."""
    return (x_BTD.float() + pos_embed_1TD).to(x_BTD.dtype)
