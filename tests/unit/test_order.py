"""The sample order at the size of ImageNet, far into a run, and how random it looks."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from dit_scale.data import order
from dit_scale.data.batch_plan import batch_plan
from dit_scale.data.order import Order, mix64, permute, round_keys, sample_ids

IMAGENET = 1_281_167


def epoch_of(seed: int, epoch: int, num_samples: int = IMAGENET) -> np.ndarray:
    return permute(np.arange(num_samples, dtype=np.uint64), num_samples, seed, epoch)


@pytest.fixture(scope="module")
def first_epoch() -> np.ndarray:
    return epoch_of(0, 0)


def python_permute(index: int, num_samples: int, seed: int, epoch: int, *branch: int) -> int:
    """The permutation as docs/formats.md defines it, in Python integers."""
    low = 2**64 - 1

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & low
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & low
        return value ^ (value >> 31)

    state = mix(seed) + epoch
    for number in branch:
        state = mix(state + 0x9E3779B97F4A7C15 & low) + number
    half = 1
    while 4**half < num_samples:
        half += 1
    while True:
        left, right = divmod(index, 2**half)
        for i in range(8):
            key = mix(state + (i + 1) * 0x9E3779B97F4A7C15 & low)
            left, right = right, left ^ (mix(right + key & low) & (2**half - 1))
        index = left << half | right
        if index < num_samples:
            return index


def python_windows(sizes: list[int], window_shards: int, seed: int, epoch: int) -> list[int]:
    """An epoch of windows as docs/formats.md defines it."""
    shards = [python_permute(i, len(sizes), seed, epoch, 0) for i in range(len(sizes))]
    ids = []
    for window, first in enumerate(range(0, len(sizes), window_shards)):
        chosen = shards[first : first + window_shards]
        samples = [sum(sizes[:shard]) + row for shard in chosen for row in range(sizes[shard])]
        ids += [
            samples[python_permute(i, len(samples), seed, epoch, window + 1)] for i in range(len(samples))
        ]
    return ids


def test_mix64_gives_the_published_sequence_of_splitmix64() -> None:
    states = [1234567 + (i + 1) * 0x9E3779B97F4A7C15 & (2**64 - 1) for i in range(5)]
    assert mix64(np.array(states, dtype=np.uint64)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 16, 17, 1000, 4**10, IMAGENET, 2**40 + 1])
def test_permute_is_as_documented(num_samples: int) -> None:
    index = sorted({0, num_samples // 3, num_samples - 1})
    for seed, epoch in ((0, 0), (2**32 - 1, 7), (5, 10**9)):
        ids = permute(np.array(index, dtype=np.uint64), num_samples, seed, epoch)
        assert ids.tolist() == [python_permute(i, num_samples, seed, epoch) for i in index]


@pytest.mark.parametrize(
    ("sizes", "window_shards"),
    [([5, 3, 4, 6, 2], 2), ([1], 1), ([0, 7, 0, 0, 9], 1), ([0, 7, 0, 0, 9], 3), ([40, 1, 33], 99)],
)
def test_windows_are_as_documented(sizes: list[int], window_shards: int) -> None:
    num = sum(sizes)
    for seed, epoch in ((0, 0), (2**32 - 1, 7), (5, 10**9)):
        ids = Order(num, seed, sizes, window_shards).ids(np.arange(epoch * num, (epoch + 1) * num))
        assert ids.tolist() == python_windows(sizes, window_shards, seed, epoch)


def test_without_windows_the_entire_data_set_is_mixed() -> None:
    positions = np.arange(250)
    order = Order(100, 3, [40, 60])
    assert order.ids(positions).tolist() == sample_ids(positions, 100, 3).tolist()
    assert order.shards_ahead(0) == (0, 1)
    assert order.shards_ahead(10**12) is order.shards_ahead(0)


def test_windows_ahead_continue_into_the_next_epoch() -> None:
    order = Order(70, 3, [10] * 7, window_shards=3)
    first, later = (
        [order.shards_ahead(epoch * 70 + window * 30) for window in range(3)] for epoch in (10**9, 10**9 + 1)
    )
    assert sorted(first[0][:3] + first[1][:3] + first[2][:1]) == list(range(7))
    assert first[0][3:] == first[1][:3]
    assert first[1][3:] == first[2][:1]
    assert set(first[2]) == {*first[2][:1], *later[0][:3]}


@pytest.mark.parametrize("world", [1, 3, 6, 7, 256])
def test_an_epoch_of_imagenet_has_each_sample_once(first_epoch: np.ndarray, world: int) -> None:
    plan = batch_plan(256, 32, world)
    num_steps = -(-IMAGENET // 256)
    real = []
    for rank in range(world):
        indices = plan.indices(rank, 0, num_steps)
        real += [indices[:, m, :num_real].ravel() for m, num_real in enumerate(plan.num_real(rank))]
    positions = np.concatenate(real)
    assert len(positions) == num_steps * 256
    ids = first_epoch[positions[positions < IMAGENET]]
    assert np.array_equal(np.bincount(ids.astype(np.int64), minlength=IMAGENET), np.ones(IMAGENET))


def test_sample_ids_continue_into_the_next_epoch(first_epoch: np.ndarray) -> None:
    around = sample_ids(np.arange(IMAGENET - 100, IMAGENET + 100), IMAGENET, 0)
    assert np.array_equal(around[:100], first_epoch[-100:])
    assert np.array_equal(around[100:], epoch_of(0, 1)[:100])


def test_every_epoch_and_seed_has_its_own_order(first_epoch: np.ndarray) -> None:
    # Two random orders agree in about one place; Poisson with mean 1 exceeds 10 once in 10^8.
    others = [epoch_of(0, 1), epoch_of(0, 2), epoch_of(1, 0), epoch_of(2**32 - 1, 0)]
    orders = [first_epoch, *others]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert int((one == other).sum()) <= 10


def test_an_epoch_is_not_another_seeds_epoch() -> None:
    keys = {tuple(round_keys(seed, epoch).tolist()) for seed in range(100) for epoch in range(100)}
    assert len(keys) == 10_000


def test_an_epoch_looks_random(first_epoch: np.ndarray) -> None:
    from scipy import stats

    ids, index = first_epoch.astype(np.float64), np.arange(IMAGENET)
    limit = 4 / np.sqrt(IMAGENET)
    assert abs(np.corrcoef(index, ids)[0, 1]) < limit
    for lag in (1, 2, 256, 257):
        assert abs(np.corrcoef(ids[:-lag], ids[lag:])[0, 1]) < limit
    assert abs(np.corrcoef(ids, epoch_of(0, 1).astype(np.float64))[0, 1]) < limit
    # Any stretch of the epoch is spread evenly over the listing, which is sorted by class.
    for start in (0, IMAGENET // 2):
        counts, _ = np.histogram(ids[start : start + 100_000], bins=1000, range=(0, IMAGENET))
        assert stats.chisquare(counts).pvalue > 1e-3
    # Steps between neighbours: a permutation rises as often as it falls.
    rises = int((np.diff(ids) > 0).sum())
    assert abs(rises - IMAGENET / 2) < 4 * np.sqrt(IMAGENET / 12)


@pytest.mark.parametrize("num_samples", [3, 4])
def test_every_order_of_a_few_samples_is_equally_likely(num_samples: int) -> None:
    from scipy import stats

    counts = Counter(tuple(epoch_of(0, epoch, num_samples).tolist()) for epoch in range(2000))
    assert len(counts) == math.factorial(num_samples)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_work_does_not_grow_with_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[int] = []
    feistel = order._feistel

    def counting(value: order.U64, half_bits: int, keys: order.U64) -> order.U64:
        worked.append(value.size)
        return feistel(value, half_bits, keys)

    monkeypatch.setattr(order, "_feistel", counting)
    plain = Order(IMAGENET, 0)
    windows = Order(IMAGENET, 0, [4096] * 312 + [3215], window_shards=8)
    for one in (plain, windows):
        for first in (0, 10**6, 10**9, 10**12, 10**15):
            worked.clear()
            one.ids(np.arange(first, first + 1000))
            # Cycle walking permutes a value less than 4 times on average, at any position; a windowed
            # epoch (two, across a border) starts with a permutation of 313 shards.
            assert sum(worked) < 1.2 * 4 * (1000 + 2 * 313)


def test_positions_are_computed_from_the_step_directly() -> None:
    plan = batch_plan(256, 32, 7)
    step = 10**15 // 256
    firsts = [int(plan.indices(rank, step)[0, 0, 0]) for rank in range(7)]
    assert firsts[0] == step * 256
    assert all(0 < b - a <= 37 for a, b in pairwise(firsts))
