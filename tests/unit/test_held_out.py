"""The held-out split: training never reads it, and it depends on nothing but sample id, share and seed."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_scale.config import DataConfig
from dit_scale.data.batch_plan import batch_plan
from dit_scale.data.held_out import fractions, held_out_mask
from dit_scale.data.loader import Loader
from dit_scale.data.order import Order
from dit_scale.data.quarantine import Quarantine
from dit_scale.data.shards import LatentDataset
from dit_scale.errors import ConfigError
from tests.support.latents import write_latents

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=10).filter(lambda sizes: sum(sizes) > 1)
SEED = st.integers(0, 2**32 - 1)


def half_at_random(num: int, seed: int) -> np.ndarray:
    """Return a split with samples on both sides."""
    numbers = fractions(num, seed)
    return numbers < np.median(numbers) if num > 1 else np.zeros(num, dtype=bool)


@given(SIZES, st.integers(0, 12), SEED, SEED, st.integers(0, 10**6))
@settings(max_examples=60)
def test_an_epoch_has_each_trained_sample_once_and_no_other(
    sizes: list[int], window_shards: int, seed: int, split_seed: int, epoch: int
) -> None:
    held_out = half_at_random(sum(sizes), split_seed)
    order = Order(sum(sizes), seed, sizes, window_shards, held_out)
    trained = np.flatnonzero(~held_out)
    assert order.num_samples == len(trained)
    first = epoch * len(trained)
    ids = order.ids(np.arange(first, first + 2 * len(trained), dtype=np.int64))
    for part in np.split(ids, 2):
        assert np.sort(part).tolist() == trained.tolist()
    assert order.ids(np.array([first + len(trained) // 2])).tolist() == [ids[len(trained) // 2]]


@given(SIZES, st.integers(1, 4), SEED, st.integers(0, 10**4))
@settings(max_examples=40)
def test_a_window_holds_the_trained_samples_of_its_shards(
    sizes: list[int], window_shards: int, seed: int, epoch: int
) -> None:
    held_out = half_at_random(sum(sizes), seed)
    order = Order(sum(sizes), seed, sizes, window_shards, held_out)
    ends = np.cumsum(sizes)
    for position in range(epoch * order.num_samples, (epoch + 1) * order.num_samples):
        shard = int(np.searchsorted(ends, order.ids(np.array([position]))[0], side="right"))
        assert shard in order.shards_ahead(position)[:window_shards]


def test_a_larger_share_holds_out_the_same_samples_and_more() -> None:
    few, many = held_out_mask(1000, 0.1, 3), held_out_mask(1000, 0.2, 3)
    assert few is not None
    assert many is not None
    assert 70 < few.sum() < 130
    assert (many | ~few).all()
    assert many.sum() > few.sum()


def test_the_split_of_a_sample_does_not_depend_on_the_number_of_samples() -> None:
    assert fractions(100, 7).tolist() == fractions(10_000, 7)[:100].tolist()
    assert fractions(100, 7).tolist() != fractions(100, 8).tolist()


def test_the_fractions_are_uniform_and_do_not_follow_the_ids() -> None:
    numbers = fractions(100_000, 0)
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert abs(counts - 5000).max() < 5 * 5000**0.5
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers, np.arange(len(numbers)))[0, 1]) < 0.02


def test_no_share_leaves_the_order_as_it_was() -> None:
    assert held_out_mask(10, 0.0, 0) is None


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_a_split_with_an_empty_side_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.held_out=.* of 10 samples"):
        held_out_mask(10, share, 0)


def test_a_held_out_sample_never_replaces_a_damaged_one() -> None:
    held_out = np.array([False, True, True, False, False])
    quarantine = Quarantine(5, [0, 3], "quarantine", held_out)
    assert quarantine.replace(np.array([0, 3, 4])).tolist() == [4, 4, 4]
    assert quarantine.replace(np.array([4])).tolist() == [4]


def test_further_damage_is_replaced_on_request() -> None:
    quarantine = Quarantine(5, [0], "quarantine")
    assert quarantine.replace(np.array([0, 2]), also=[1, 2]).tolist() == [3, 3]
    assert quarantine.replace(np.array([0, 2])).tolist() == [1, 2]


@pytest.mark.parametrize("window_shards", [0, 1, 2])
def test_no_rank_of_any_world_reads_a_held_out_sample(tmp_path: Path, window_shards: int) -> None:
    num = 40
    write_latents(tmp_path, num=num)
    dataset = LatentDataset.open(tmp_path)
    held_out = held_out_mask(num, 0.25, 1)
    assert held_out is not None
    wanted = None
    for world in (1, 2, 3):
        seen = []
        for rank in range(world):
            config = DataConfig(horizontal_flip=False, window_shards=window_shards)
            plan = batch_plan(6, 2, world)
            loader = Loader(dataset, config, plan, rank=rank, seed=5, first_step=3, held_out=held_out)
            steps = [[next(loader) for _ in range(plan.micro_steps)] for _ in range(12)]
            loader.close()
            seen.append(steps)
            ids = np.concatenate([loader.sample_ids(step) for step in range(3, 15)])
            assert not held_out[ids].any()
            expected = ids if wanted is None else wanted
            assert ids.tolist() == expected.tolist()
            wanted = ids
        assert wanted is not None
        by_position = {
            int(position): batch.moments_B2CHW[row].numpy()
            for steps in seen
            for step in steps
            for batch in step
            for row, position in enumerate(batch.position_B)
        }
        assert len(by_position) == 72
        for position, sample_id in zip(sorted(by_position), wanted.tolist(), strict=True):
            assert (by_position[position] == dataset.read(sample_id)[0][0]).all()
