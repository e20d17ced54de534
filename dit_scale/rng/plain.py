"""The plain version of the draws, in torch's operators: what they are, on any device.

Shapes: N positions, W words per position, B blocks of four words.
"""

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Apply ten rounds of Philox4x32 to int64 tensors of 32-bit words (Salmon et al. 2011, Section 3.3).

    Products wrap modulo 2^64. In two's complement their bits equal those of the unsigned product, so the
    high word is correct after masking.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK) ^ c1 ^ k0,
            p1 & MASK,
            ((p0 >> 32) & MASK) ^ c3 ^ k1,
            p0 & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def words(position_N: Tensor, seed: int, purpose: int, num_words: int, stream: int = 0) -> Tensor:
    """Return the first words of each position => (N, W) int64; block i yields words 4i to 4i + 3."""
    position_N1 = position_N.unsqueeze(1)
    block_1B = torch.arange((num_words + 3) // 4, device=position_N.device, dtype=torch.int64).unsqueeze(0)
    shape = (position_N1.shape[0], block_1B.shape[1])
    counter = (
        (position_N1 & MASK).expand(shape),
        ((position_N1 >> 32) & MASK).expand(shape),
        block_1B.expand(shape),
        torch.full(shape, stream, device=position_N.device, dtype=torch.int64),
    )
    return torch.stack(philox4x32(counter, (seed, purpose)), dim=2).flatten(1)[:, :num_words]


def integers(position_N: Tensor, seed: int, purpose: int, high: int) -> Tensor:
    """floor(word 0 * high / 2^32) of each position => (N,) int64."""
    return (words(position_N, seed, purpose, 1)[:, 0] * high) >> 32


def uniforms(position_N: Tensor, seed: int, purpose: int) -> Tensor:
    """Word 0 of each position / 2^32 => (N,) float64."""
    return words(position_N, seed, purpose, 1)[:, 0].to(torch.float64) * 2.0**-32


def normals(position_N: Tensor, seed: int, purpose: int, count: int, stream: int) -> Tensor:
    """Box-Muller normals of consecutive pairs of words => (N, count) fp32.

    With u1 = (w0 + 1/2) / 2^32 and u2 = w1 / 2^32, the even element is sqrt(-2 ln u1) cos(2 pi u2) and the
    odd element is sqrt(-2 ln u1) sin(2 pi u2).
    """
    pairs_NP2 = words(position_N, seed, purpose, count + count % 2, stream).unflatten(1, (-1, 2))
    return box_muller(pairs_NP2)[:, :count].to(torch.float32)


def box_muller(pairs_NP2: Tensor) -> Tensor:
    """Pairs of words => (N, 2 * P) float64."""
    radius_NP = torch.sqrt(-2.0 * torch.log((pairs_NP2[..., 0].to(torch.float64) + 0.5) * 2.0**-32))
    angle_NP = pairs_NP2[..., 1].to(torch.float64) * (2.0 * math.pi * 2.0**-32)
    normal_NP2 = torch.stack((radius_NP * torch.cos(angle_NP), radius_NP * torch.sin(angle_NP)), dim=2)
    return normal_NP2.flatten(1)
