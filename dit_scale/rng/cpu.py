"""The draws on a CPU: the bits of the plain version, in less time.

The plain version writes a new tensor for each of its operations. Here they work in place, on chunks that stay
in a core's cache. Integers are numpy's: they can be unsigned, so that high words need no mask, and each call
costs less. Logarithm, sine and cosine remain those of torch, whose last bits differ from numpy's.

Shapes: N positions, B blocks of four words, R positions of a chunk.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_scale.rng.plain import MASK, MULTIPLIERS, WEYL

CHUNK_BLOCKS = 16384
"""Blocks to compute at once: their counters, products and normals take one to two MiB."""


def philox4x32_(
    counter_4RB: NDArray[np.uint64], scratch_2RB: NDArray[np.uint64], key: tuple[int, int]
) -> None:
    """Turn counters into words in place, as `plain.philox4x32` does; `scratch_2RB` is overwritten."""
    c0, c1, c2, c3 = counter_4RB
    p0, p1 = scratch_2RB
    k0, k1 = key
    for _ in range(10):
        np.multiply(c0, MULTIPLIERS[0], out=p0)
        np.multiply(c2, MULTIPLIERS[1], out=p1)
        np.right_shift(p1, 32, out=c0)
        np.right_shift(p0, 32, out=c2)
        c0 ^= c1
        c0 ^= k0
        c2 ^= c3
        c2 ^= k1
        np.bitwise_and(p1, MASK, out=c1)
        np.bitwise_and(p0, MASK, out=c3)
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK


def blocks_(
    position_R: NDArray[np.uint64], room_6RB: NDArray[np.uint64], seed: int, purpose: int, stream: int = 0
) -> Tensor:
    """Compute the words of a chunk in `room_6RB` => (4, R, B) int64, a view of it."""
    counter_4RB = room_6RB[:4]
    counter_4RB[0] = position_R[:, None] & MASK
    counter_4RB[1] = position_R[:, None] >> 32
    counter_4RB[2] = np.arange(room_6RB.shape[2], dtype=np.uint64)
    counter_4RB[3] = stream
    philox4x32_(counter_4RB, room_6RB[4:], (seed, purpose))
    return torch.from_numpy(counter_4RB.view(np.int64))


def first_words(position_N: Tensor, seed: int, purpose: int) -> Tensor:
    """Return word 0 of each position => (N,) int64."""
    room_6N1 = np.empty((6, len(position_N), 1), np.uint64)
    return blocks_(position_N.numpy().view(np.uint64), room_6N1, seed, purpose)[0, :, 0]


def integers(position_N: Tensor, seed: int, purpose: int, high: int) -> Tensor:
    """See `plain.integers`."""
    return (first_words(position_N, seed, purpose) * high) >> 32


def uniforms(position_N: Tensor, seed: int, purpose: int) -> Tensor:
    """See `plain.uniforms`."""
    return first_words(position_N, seed, purpose).to(torch.float64) * 2.0**-32


def normals(position_N: Tensor, seed: int, purpose: int, count: int, stream: int) -> Tensor:
    """See `plain.normals`."""
    num_blocks = -(-count // 4)
    rows = max(1, min(CHUNK_BLOCKS // num_blocks, len(position_N)))
    room_6RB = np.empty((6, rows, num_blocks), np.uint64)
    room_3RB = torch.empty(3, rows, num_blocks, dtype=torch.float64)
    normal_NB4 = torch.empty(len(position_N), num_blocks, 4)
    for chunk_R, out_RB4 in zip(position_N.split(rows), normal_NB4.split(rows), strict=True):
        num = len(chunk_R)
        words_4RB = blocks_(chunk_R.numpy().view(np.uint64), room_6RB[:, :num], seed, purpose, stream)
        for pair in (0, 2):
            box_muller_(words_4RB[pair : pair + 2], room_3RB[:, :num], out_RB4[..., pair : pair + 2])
    return normal_NB4.flatten(1)[:, :count].contiguous()


def box_muller_(words_2RB: Tensor, room_3RB: Tensor, out_RB2: Tensor) -> None:
    """Write the two normals of each pair of words, in the order of operations of `plain.box_muller`."""
    radius_RB, cosine_RB, sine_RB = room_3RB
    radius_RB.copy_(words_2RB[0]).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    cosine_RB.copy_(words_2RB[1]).mul_(2.0 * math.pi * 2.0**-32)
    torch.sin(cosine_RB, out=sine_RB)
    cosine_RB.cos_()
    out_RB2[..., 0] = cosine_RB.mul_(radius_RB)
    out_RB2[..., 1] = sine_RB.mul_(radius_RB)
