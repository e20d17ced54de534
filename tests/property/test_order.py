"""The order of samples is a permutation of every epoch, whatever the data set, batch and world."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_scale.data.loader import micro_positions
from dit_scale.data.order import permute, rank_slice, sample_ids
from dit_scale.data.plan import batch_plan

SEED = st.integers(0, 2**32 - 1)


@given(st.integers(1, 3000), SEED, st.integers(0, 2**40))
def test_permute_is_a_bijection(num_samples: int, seed: int, epoch: int) -> None:
    ids = permute(np.arange(num_samples, dtype=np.uint64), num_samples, seed, epoch)
    assert np.array_equal(np.sort(ids), np.arange(num_samples))


@given(st.integers(3000, 2**62), SEED, st.integers(0, 10**6), st.data())
def test_permute_stays_in_range_and_apart(
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


@given(st.integers(1, 5000), st.integers(1, 300))
def test_rank_slices_are_contiguous_and_even(global_batch: int, world: int) -> None:
    slices = [rank_slice(global_batch, rank, world) for rank in range(world)]
    assert [i for part in slices for i in part] == list(range(global_batch))
    sizes = [len(part) for part in slices]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 400), st.integers(1, 70), st.integers(1, 40), st.integers(0, 10**10))
@settings(max_examples=60)
def test_real_positions_of_a_step_are_the_steps_positions(
    global_batch: int, micro_batch: int, world: int, step: int
) -> None:
    world = min(world, global_batch)
    plan = batch_plan(global_batch, micro_batch, world)
    real: list[int] = []
    for rank in range(world):
        parts = micro_positions(plan, rank, step)
        assert len(parts) == plan.micro_steps
        for positions, num_real in parts:
            assert positions.shape == (plan.micro_batch,)
            assert 0 <= num_real <= plan.micro_batch
            real += positions[:num_real].tolist()
    first = step * global_batch
    assert real == list(range(first, first + global_batch))
