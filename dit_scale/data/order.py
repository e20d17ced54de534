"""Which sample is at which position: a keyed permutation per epoch, O(1) memory, numpy only.

position = step * global_batch + i counts samples since the start of the run and is never reset.
epoch = position // N. The sample at a position is a permutation of (position mod N), keyed by
(seed, epoch): each sample exactly once per epoch, no padding, no duplicates, for any N.

The permutation is a balanced Feistel network of `ROUNDS` rounds on 2h bits, the smallest even
number of bits that holds N, with cycle walking: a value of N or more is sent through again. Its
round function and key schedule are the SplitMix64 finaliser and sequence (Steele, Lea, Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). docs/formats.md has golden vectors.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
_GAMMA = 0x9E3779B97F4A7C15
_U64 = 0xFFFFFFFFFFFFFFFF

U64 = NDArray[np.uint64]


def mix64(value: U64) -> U64:
    """The SplitMix64 finaliser: a bijection of 64-bit words."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def round_keys(seed: int, epoch: int) -> U64:
    """SplitMix64 outputs 1..ROUNDS of the state mix64(seed) + epoch, one key per round."""
    start = int(mix64(np.array([seed], dtype=np.uint64))[0]) + epoch
    states = [(start + (i + 1) * _GAMMA) & _U64 for i in range(ROUNDS)]
    return mix64(np.array(states, dtype=np.uint64))


def permute(index: U64, num_samples: int, seed: int, epoch: int) -> U64:
    """The permutation of [0, num_samples) keyed by (seed, epoch), elementwise over `index`."""
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    keys = round_keys(seed, epoch)
    out = _feistel(index.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(out >= num_samples)
    while outside.size:
        out[outside] = _feistel(out[outside], half_bits, keys)
        outside = outside[out[outside] >= num_samples]
    return out


def _feistel(value: U64, half_bits: int, keys: U64) -> U64:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (mix64(right + key) & mask)
    return (left << shift) | right


def sample_ids(positions: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.int64]:
    """The sample id at each position, int64 of the same shape (positions may span epochs)."""
    epochs, index = np.divmod(positions, num_samples)
    ids = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permute(index[here].astype(np.uint64), num_samples, seed, int(epoch)).astype(np.int64)
    return ids


def rank_slice(global_batch: int, rank: int, world: int) -> range:
    """The contiguous part of [0, global_batch) that a rank takes; sizes differ by at most one."""
    base, extra = divmod(global_batch, world)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))
