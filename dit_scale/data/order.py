"""Which sample is at which position: keyed permutations per epoch, at a constant cost for any position.

position = step * global_batch + i counts samples since the start of the run and is never reset; excluded
positions are skipped. epoch = position // N. The sample at a position is a permutation of (position mod N),
keyed by (seed, epoch): each sample exactly once per epoch, no padding, no duplicates, for any N. With
windows, samples are mixed within a few shards at a time.

A permutation is a balanced Feistel network of `ROUNDS` rounds on 2h bits, the smallest even
number of bits that holds N, with cycle walking: values of N or more are permuted again. Its
round function and key schedule are the SplitMix64 finaliser and sequence (Steele, Lea, Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). docs/formats.md has golden vectors.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
_GAMMA = 0x9E3779B97F4A7C15
_U64 = 0xFFFFFFFFFFFFFFFF

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Ranges = Sequence[tuple[int, int]]
"""Half-open ranges of positions, sorted and disjoint."""


def mix64(value: U64) -> U64:
    """Apply the SplitMix64 finaliser, a bijection of 64-bit words."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def round_keys(seed: int, epoch: int, *branch: int) -> U64:
    """Return SplitMix64 outputs 1..ROUNDS of the state mix64(seed) + epoch, one key per round.

    Each number of `branch` derives a new state: mix64(state + gamma) + number.
    """
    state = _mix(seed) + epoch
    for number in branch:
        state = _mix(state + _GAMMA) + number
    states = [(state + (i + 1) * _GAMMA) & _U64 for i in range(ROUNDS)]
    return mix64(np.array(states, dtype=np.uint64))


def permute(index: U64, num_samples: int, seed: int, epoch: int, *branch: int) -> U64:
    """Apply the permutation of [0, num_samples) keyed by (seed, epoch, *branch), elementwise to `index`."""
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    keys = round_keys(seed, epoch, *branch)
    out = _feistel(index.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(out >= num_samples)
    while outside.size:
        out[outside] = _feistel(out[outside], half_bits, keys)
        outside = outside[out[outside] >= num_samples]
    return out


def _mix(value: int) -> int:
    return int(mix64(np.array([value & _U64], dtype=np.uint64))[0])


def _feistel(value: U64, half_bits: int, keys: U64) -> U64:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (mix64(right + key) & mask)
    return (left << shift) | right


def sample_ids(positions: I64, num_samples: int, seed: int) -> I64:
    """Return the sample id at each position, int64 of the same shape. Positions may span epochs."""
    epochs, index = np.divmod(positions, num_samples)
    ids = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permute(index[here].astype(np.uint64), num_samples, seed, int(epoch)).astype(np.int64)
    return ids


def positions_of(indices: I64, excluded: Ranges) -> I64:
    """Return the position of each sample index of a run: index k is the k-th position that is not excluded.

    int64 of the same shape. Appending a range changes no position before it.
    """
    if not excluded:
        return indices
    starts, ends = np.array(excluded, dtype=np.int64).T
    lengths = ends - starts
    assert (lengths > 0).all(), f"empty range in {excluded}"
    assert (starts[1:] >= ends[:-1]).all(), f"not sorted or not disjoint: {excluded}"
    left_out = np.concatenate(([0], np.cumsum(lengths)))
    # The index of the first sample after each range.
    resumes = starts - left_out[:-1]
    return indices + left_out[np.searchsorted(resumes, indices, side="right")]


def ranges_of(positions: I64) -> tuple[tuple[int, int], ...]:
    """Return ascending positions as half-open ranges."""
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(positions, cuts))


@dataclass(frozen=True)
class _Windows:
    """One epoch of a windowed order."""

    shards: I64
    """Numbers of all shards, in the epoch's order."""
    shard_ends: I64
    """Number of samples up to the end of each shard, in that order."""
    window_ends: I64
    """Number of samples up to the end of each window."""


class Order:
    """The sample order of a run: mixed over the entire data set, or over a few shards at a time.

    With `window_shards` W > 0, each epoch permutes the shards, splits them into windows of W shards, and
    permutes the samples within each window; `shard_samples` has the sizes of all shards.

    With `held_out`, which is true for the ids to leave out, the other samples are numbered without gaps, and
    everything above holds for these numbers: an epoch has only the samples that are trained on.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        shard_samples: Sequence[int] = (),
        window_shards: int = 0,
        held_out: NDArray[np.bool_] | None = None,
    ) -> None:
        assert not window_shards or sum(shard_samples) == num_samples
        self.num_samples, self.seed, self.window_shards = num_samples, seed, window_shards
        self._sizes = np.array(shard_samples, dtype=np.int64)
        self._trained: I64 | None = None
        """The ids that are trained on, ascending; None for all."""
        if held_out is not None:
            self._trained = np.flatnonzero(~held_out)
            self.num_samples = len(self._trained)
            edges = np.searchsorted(self._trained, np.cumsum(self._sizes))
            self._sizes = np.diff(edges, prepend=0)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._windows = functools.lru_cache(maxsize=2)(self._compute_windows)
        self._ahead = functools.lru_cache(maxsize=2)(self._compute_ahead)

    def ids(self, positions: I64) -> I64:
        """Return the sample id at each position, int64 of the same shape. Positions may span epochs."""
        numbers = self._numbers(positions)
        return numbers if self._trained is None else self._trained[numbers]

    def shards_ahead(self, position: int) -> tuple[int, ...]:
        """Return the shards of this position's window, then those of the next window.

        Without windows, returns all shards. Returns the same object as long as the answer is the same.
        """
        if not self.window_shards:
            return self._ahead(0, 0)
        epoch, index = divmod(position, self.num_samples)
        window = int(np.searchsorted(self._windows(epoch).window_ends, index, side="right"))
        return self._ahead(epoch, window)

    def _numbers(self, positions: I64) -> I64:
        """Return the number at each position among the samples that are trained on."""
        if not self.window_shards:
            return sample_ids(positions, self.num_samples, self.seed)
        epochs, index = np.divmod(positions, self.num_samples)
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = self._numbers_in_epoch(int(epoch), index[here])
        return numbers

    def _numbers_in_epoch(self, epoch: int, index: I64) -> I64:
        """Return the numbers at these indices, 0 to N - 1, of an epoch."""
        windows = self._windows(epoch)
        numbers = np.searchsorted(windows.window_ends, index, side="right")
        places = np.empty_like(index)
        for number in np.unique(numbers):
            here = numbers == number
            end = int(windows.window_ends[number])
            start = int(windows.window_ends[number - 1]) if number else 0
            row = (index[here] - start).astype(np.uint64)
            mixed = permute(row, end - start, self.seed, epoch, int(number) + 1)
            places[here] = start + mixed.astype(np.int64)
        at = np.searchsorted(windows.shard_ends, places, side="right")
        shards = windows.shards[at]
        return places - windows.shard_ends[at] + self._sizes[shards] + self._firsts[shards]

    def _compute_windows(self, epoch: int) -> _Windows:
        numbers = np.arange(len(self._sizes), dtype=np.uint64)
        shards = permute(numbers, len(numbers), self.seed, epoch, 0).astype(np.int64)
        shard_ends = np.cumsum(self._sizes[shards])
        last = np.minimum(np.arange(0, len(shards), self.window_shards) + self.window_shards, len(shards)) - 1
        return _Windows(shards, shard_ends, shard_ends[last])

    def _compute_ahead(self, epoch: int, window: int) -> tuple[int, ...]:
        if not self.window_shards:
            return tuple(range(len(self._sizes)))
        size = self.window_shards
        windows = self._windows(epoch)
        ahead = windows.shards[window * size : (window + 2) * size].tolist()
        if (window + 1) * size >= len(windows.shards):
            ahead += [s for s in self._windows(epoch + 1).shards[:size].tolist() if s not in ahead]
        return tuple(ahead)


def rank_slice(global_batch: int, rank: int, world: int) -> range:
    """Return the contiguous part of [0, global_batch) that belongs to a rank; sizes differ by at most one."""
    base, extra = divmod(global_batch, world)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))
