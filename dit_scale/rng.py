"""Stateless random draws, keyed by position: Philox4x32-10, computed on the device.

Every draw of training and sampling is a pure function of (seed, purpose, position): the Philox key is
(seed, purpose) and the counter is (position, block, stream). A draw therefore does not depend on the rank,
the world size, the micro-batch or earlier draws, and a checkpoint needs no random state.

Integers and uniforms are exact on every device. Normals are computed in float64 and rounded once to fp32, so
two devices differ by at most one fp32 ulp, where their float64 math libraries differ.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

Shapes: N positions, W words per position.
"""

import enum
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Purpose(enum.IntEnum):
    """What a draw is for: the second key word. The numbers are part of the file format; never reuse one."""

    TIMESTEP = 0
    NOISE = 1
    LABEL_DROP = 2
    VIEW = 3
    POSTERIOR = 4
    SAMPLE_START = 5
    SAMPLE_STEP = 6
    HELD_OUT_TIMESTEP = 7
    HELD_OUT_NOISE = 8
    HELD_OUT_POSTERIOR = 9
    SAMPLE_LABEL = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Apply ten rounds of Philox4x32 to int64 tensors of 32-bit words (Salmon et al. 2011, Section 3.3).

    Products wrap modulo 2^64. In two's complement their bits equal those of the unsigned product, so the
    high word is correct after masking.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: int, purpose: Purpose, position_N: Tensor, num_words: int, stream: int = 0) -> Tensor:
    """Return the first `num_words` 32-bit words of each position => (N, num_words) int64.

    The counter is (position low, position high, block, stream); block i yields words 4i to 4i + 3. `stream`
    separates draws with the same purpose and position, such as the steps of a sampler.
    """
    position_N1 = position_N.to(torch.int64).unsqueeze(1)
    block_1B = torch.arange((num_words + 3) // 4, device=position_N.device, dtype=torch.int64).unsqueeze(0)
    shape = (position_N1.shape[0], block_1B.shape[1])
    counter = (
        (position_N1 & _MASK).expand(shape),
        ((position_N1 >> 32) & _MASK).expand(shape),
        block_1B.expand(shape),
        torch.full(shape, stream, device=position_N.device, dtype=torch.int64),
    )
    return torch.stack(philox4x32(counter, (seed, int(purpose))), dim=2).flatten(1)[:, :num_words]


def integers(seed: int, purpose: Purpose, position_N: Tensor, high: int) -> Tensor:
    """Draw one integer in [0, high) per position => (N,) int64: floor(word * high / 2^32)."""
    return (words(seed, purpose, position_N, 1)[:, 0] * high) >> 32


def uniforms(seed: int, purpose: Purpose, position_N: Tensor) -> Tensor:
    """Draw one number in [0, 1) per position => (N,) float64: word / 2^32, exactly."""
    return words(seed, purpose, position_N, 1)[:, 0].to(torch.float64) * 2.0**-32


def normals(
    seed: int, purpose: Purpose, position_N: Tensor, shape: tuple[int, ...], stream: int = 0
) -> Tensor:
    """Draw standard normals => (N, *shape) fp32, with the Box-Muller transform of consecutive word pairs.

    With u1 = (w0 + 1/2) / 2^32 and u2 = w1 / 2^32, the even element is sqrt(-2 ln u1) cos(2 pi u2) and the
    odd element is sqrt(-2 ln u1) sin(2 pi u2).
    """
    count = math.prod(shape)
    pairs_NP2 = words(seed, purpose, position_N, count + count % 2, stream).unflatten(1, (-1, 2))
    radius_NP = torch.sqrt(-2.0 * torch.log((pairs_NP2[..., 0].to(torch.float64) + 0.5) * 2.0**-32))
    angle_NP = pairs_NP2[..., 1].to(torch.float64) * (2.0 * math.pi * 2.0**-32)
    normal_NW = torch.stack((radius_NP * torch.cos(angle_NP), radius_NP * torch.sin(angle_NP)), dim=2)
    return normal_NW.flatten(1)[:, :count].to(torch.float32).reshape(-1, *shape)
