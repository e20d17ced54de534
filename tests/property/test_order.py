"""The sample order is a permutation of every epoch, for any data set, batch and world size."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_scale.data.batch_plan import batch_plan
from dit_scale.data.order import Order, permute, positions_of, rank_slice, sample_ids

SEED = st.integers(0, 2**32 - 1)


@given(st.integers(1, 3000), SEED, st.integers(0, 2**40))
def test_permute_is_a_bijection(num_samples: int, seed: int, epoch: int) -> None:
    ids = permute(np.arange(num_samples, dtype=np.uint64), num_samples, seed, epoch)
    assert np.array_equal(np.sort(ids), np.arange(num_samples))


@given(st.integers(3000, 2**62), SEED, st.integers(0, 10**6), st.data())
def test_permute_stays_in_range_without_collisions(
    num_samples: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    index = data.draw(st.lists(st.integers(0, num_samples - 1), min_size=2, max_size=50, unique=True))
    ids = permute(np.array(index, dtype=np.uint64), num_samples, seed, epoch)
    assert int(ids.max()) < num_samples
    assert len(np.unique(ids)) == len(index)


@given(st.integers(1, 500), SEED, st.integers(0, 10**12), st.integers(1, 300))
def test_positions_one_by_one_or_together_give_the_same_ids(
    num_samples: int, seed: int, first: int, count: int
) -> None:
    positions = np.arange(first, first + count, dtype=np.int64)
    together = sample_ids(positions, num_samples, seed)
    chosen = positions[:: max(1, count // 7)]
    alone = [int(sample_ids(np.array([position]), num_samples, seed)[0]) for position in chosen]
    assert together[:: max(1, count // 7)].tolist() == alone


@given(st.integers(1, 300), SEED, st.integers(0, 10**9))
def test_every_epoch_has_each_sample_once(num_samples: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * num_samples, (epoch + 2) * num_samples, dtype=np.int64)
    first, second = np.split(sample_ids(positions, num_samples, seed), 2)
    assert np.array_equal(np.sort(first), np.arange(num_samples))
    assert np.array_equal(np.sort(second), np.arange(num_samples))


SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@given(SIZES, st.integers(1, 14), SEED, st.integers(0, 10**9))
def test_every_epoch_of_windows_has_each_sample_once(
    sizes: list[int], window_shards: int, seed: int, epoch: int
) -> None:
    num = sum(sizes)
    order = Order(num, seed, sizes, window_shards)
    positions = np.arange(epoch * num, (epoch + 2) * num, dtype=np.int64)
    ids = order.ids(positions)
    first, second = np.split(ids, 2)
    assert np.array_equal(np.sort(first), np.arange(num))
    assert np.array_equal(np.sort(second), np.arange(num))
    assert Order(num, seed, sizes, window_shards).ids(positions[::-1].copy()).tolist() == ids[::-1].tolist()
    at = num // 3
    assert order.ids(positions[at : at + 1]).tolist() == [ids[at]]


@given(SIZES, st.integers(1, 5), SEED, st.integers(0, 10**6))
def test_a_window_is_read_before_the_next_and_both_are_known_ahead(
    sizes: list[int], window_shards: int, seed: int, epoch: int
) -> None:
    num = sum(sizes)
    order = Order(num, seed, sizes, window_shards)
    first = epoch * num
    shards = np.searchsorted(np.cumsum(sizes), order.ids(np.arange(first, first + num)), side="right")
    # All samples of a shard have the same window.
    windows: dict[int, set[tuple[int, ...]]] = {}
    for at, shard in enumerate(shards.tolist()):
        ahead = order.shards_ahead(first + at)
        assert len(set(ahead)) == len(ahead) <= 2 * window_shards
        assert shard in ahead[:window_shards]
        windows.setdefault(shard, set()).add(ahead)
    assert all(len(seen) == 1 for seen in windows.values())


RANGES = st.lists(st.integers(0, 200), min_size=2, max_size=12, unique=True).map(
    lambda edges: list(zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False))
)


@given(RANGES, st.integers(1, 50))
def test_indices_map_to_the_remaining_positions(excluded: list[tuple[int, int]], length: int) -> None:
    left = [p for p in range(1000) if not any(start <= p < end for start, end in excluded)]
    indices = np.arange(500)
    positions = positions_of(indices, excluded)
    assert positions.tolist() == left[:500]
    start = int(positions[250])
    later = positions_of(indices, [*(r for r in excluded if r[1] <= start), (start, start + length)])
    assert later[:250].tolist() == positions[:250].tolist()
    assert (later[250:] >= start + length).all()


def test_excluding_nothing_changes_nothing() -> None:
    indices = np.arange(12).reshape(3, 4)
    assert positions_of(indices, ()) is indices
    assert positions_of(indices, [(12, 13)]).tolist() == indices.tolist()
    assert positions_of(indices, [(0, 10**12)]).tolist() == (indices + 10**12).tolist()


@given(st.integers(1, 5000), st.integers(1, 300))
def test_rank_slices_are_contiguous_and_even(global_batch: int, world: int) -> None:
    slices = [rank_slice(global_batch, rank, world) for rank in range(world)]
    assert [i for part in slices for i in part] == list(range(global_batch))
    sizes = [len(part) for part in slices]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 400), st.integers(1, 70), st.integers(1, 40), st.integers(0, 10**10))
@settings(max_examples=60)
def test_real_indices_of_a_step_are_the_steps_indices(
    global_batch: int, micro_batch: int, world: int, step: int
) -> None:
    world = min(world, global_batch)
    plan = batch_plan(global_batch, micro_batch, world)
    real: list[int] = []
    for rank in range(world):
        (indices,) = plan.indices(rank, step)
        assert indices.shape == (plan.micro_steps, plan.micro_batch)
        for part, num_real in zip(indices, plan.num_real(rank), strict=True):
            assert 0 <= num_real <= plan.micro_batch
            real += part[:num_real].tolist()
    first = step * global_batch
    assert real == list(range(first, first + global_batch))
