"""Micro-batches of a rank: which samples, which views, and what happens when reading fails."""

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_scale import rng
from dit_scale.config import DataConfig
from dit_scale.data.loader import Batch, Loader, draw_latents, micro_positions, read_batch
from dit_scale.data.order import sample_ids
from dit_scale.data.plan import BatchPlan, batch_plan
from dit_scale.data.shards import LatentDataset
from dit_scale.errors import DataError
from dit_scale.rng import Purpose
from tests.latents import write_latents

NUM, SEED = 40, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, num=NUM, shard_samples=16)
    return folder


@pytest.fixture(scope="module")
def dataset(folder: Path) -> LatentDataset:
    return LatentDataset.open(folder)


@contextmanager
def loading(
    dataset: LatentDataset, plan: BatchPlan, rank: int = 0, first_step: int = 0, **config: object
) -> Iterator[Loader]:
    loader = Loader(dataset, DataConfig.model_validate(config), plan, rank, SEED, first_step)
    try:
        yield loader
    finally:
        loader.close()


def take(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def assert_same(one: Batch, other: Batch) -> None:
    for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("world", [1, 3, 7])
def test_a_step_is_its_positions_whatever_the_world(dataset: LatentDataset, world: int) -> None:
    plan = batch_plan(global_batch=22, micro_batch=4, world=world)
    num_steps = 5  # 110 samples: into the third epoch of 40
    real: dict[int, tuple[int, np.ndarray]] = {}
    for rank in range(world):
        with loading(dataset, plan, rank) as loader:
            for batch in take(loader, num_steps * plan.micro_steps):
                assert batch.moments_B2CHW.shape == (plan.micro_batch, 8, 4, 4)
                for i in np.flatnonzero(batch.weight_B.numpy()):
                    position = int(batch.position_B[i])
                    assert position not in real
                    real[position] = (int(batch.y_B[i]), batch.moments_B2CHW[i].numpy())
    positions = np.arange(22 * num_steps)
    assert sorted(real) == positions.tolist()
    views = rng.integers(SEED, Purpose.VIEW, torch.from_numpy(positions), 2)
    for position, sample_id in enumerate(sample_ids(positions, NUM, SEED)):
        moments, label = dataset.read(int(sample_id))
        assert real[position][0] == label
        assert np.array_equal(real[position][1], moments[views[position]])


def test_fillers_weigh_nothing(dataset: LatentDataset) -> None:
    plan = batch_plan(global_batch=7, micro_batch=2, world=3)  # shares 3, 2, 2 in two passes of two
    weights = []
    for rank in range(3):
        with loading(dataset, plan, rank) as loader:
            weights.append([batch.weight_B.tolist() for batch in take(loader, 2)])
    assert weights == [[[1, 1], [1, 0]], [[1, 1], [0, 0]], [[1, 1], [0, 0]]]


def test_a_filler_repeats_the_ranks_last_sample(dataset: LatentDataset) -> None:
    plan = batch_plan(global_batch=7, micro_batch=2, world=3)
    parts = micro_positions(plan, 0, step=4)
    assert [(positions.tolist(), num_real) for positions, num_real in parts] == [([28, 29], 2), ([30, 30], 1)]


@pytest.mark.parametrize("prefetch", [1, 2, 9])
def test_reading_ahead_changes_nothing(dataset: LatentDataset, prefetch: int) -> None:
    plan = batch_plan(global_batch=6, micro_batch=2, world=1)
    with loading(dataset, plan, prefetch_batches=prefetch) as loader:
        batches = take(loader, 12)
    parts = [part for step in range(4) for part in micro_positions(plan, 0, step)]
    for batch, (positions, num_real) in zip(batches, parts, strict=True):
        assert_same(batch, read_batch(dataset, positions, num_real, SEED, flip=True))


def test_a_later_start_goes_on_where_an_earlier_one_would_be(dataset: LatentDataset) -> None:
    plan = batch_plan(global_batch=6, micro_batch=2, world=2)
    with loading(dataset, plan, rank=1) as from_start, loading(dataset, plan, 1, first_step=3) as later:
        for one, other in zip(take(from_start, 12)[6:], take(later, 6), strict=True):
            assert_same(one, other)


@pytest.mark.parametrize(("flip", "low", "high"), [(True, 430, 570), (False, 0, 0)])
def test_the_mirrored_view_is_drawn_half_of_the_time(
    dataset: LatentDataset, flip: bool, low: int, high: int
) -> None:
    positions = np.arange(1000)
    batch = read_batch(dataset, positions, 1000, SEED, flip)
    ids = sample_ids(positions, NUM, SEED)
    mirrored = 0
    for i, sample_id in enumerate(ids):
        image, mirror = dataset.read(int(sample_id))[0]
        drawn = batch.moments_B2CHW[i].numpy()
        assert np.array_equal(drawn, image) != np.array_equal(drawn, mirror)
        mirrored += np.array_equal(drawn, mirror)
    assert low <= mirrored <= high


def test_latents_are_drawn_from_each_samples_posterior(dataset: LatentDataset) -> None:
    batch = read_batch(dataset, np.arange(100, 108), 8, SEED, flip=True)
    z_BCHW = draw_latents(batch, SEED, scale=0.5)
    mean, std = batch.moments_B2CHW.double().chunk(2, dim=1)
    noise = rng.normals(SEED, Purpose.POSTERIOR, batch.position_B, (4, 4, 4)).double()
    assert z_BCHW.dtype == torch.float32
    torch.testing.assert_close(z_BCHW.double(), 0.5 * (mean + std * noise), rtol=1e-6, atol=1e-6)
    alone = read_batch(dataset, np.array([103]), 1, SEED, flip=True)
    assert torch.equal(draw_latents(alone, SEED, 0.5)[0], z_BCHW[3])


def test_a_batch_moves_whole(dataset: LatentDataset) -> None:
    batch = read_batch(dataset, np.arange(4), 3, SEED, flip=True)
    assert_same(batch.to(torch.device("cpu")), batch)
    assert {tensor.device.type for tensor in vars(batch.to(torch.device("meta"))).values()} == {"meta"}


def test_damage_reaches_the_next_that_would_have_returned_it(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "set"))
    whole = LatentDataset.open(copy)
    sample_id = 21  # row 5 of the second shard
    tar = copy / "shards" / "00001.tar"
    data = bytearray(tar.read_bytes())
    data[int(whole.records(1)[5]["offset"]) + 200] ^= 4
    tar.write_bytes(data)
    position = int(np.flatnonzero(sample_ids(np.arange(NUM), NUM, SEED) == sample_id)[0])
    plan = batch_plan(global_batch=1, micro_batch=1, world=1)
    with loading(LatentDataset.open(copy), plan) as loader:
        assert [int(batch.position_B[0]) for batch in take(loader, position)] == list(range(position))
        with pytest.raises(DataError, match="shard 00001, sample 21: expected CRC-32C"):
            next(loader)


def test_a_missing_shard_is_an_error_too(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "set"))
    for tar in (copy / "shards").glob("*.tar"):
        tar.unlink()
    with loading(LatentDataset.open(copy), batch_plan(4, 4, 1)) as loader:
        with pytest.raises(DataError, match="cannot open shard"):
            next(loader)


@pytest.mark.parametrize("consume", [lambda _: None, next], ids=["queue full", "after one"])
def test_close_ends_the_thread(dataset: LatentDataset, consume: Callable[[Loader], object]) -> None:
    before = threading.active_count()
    loader = Loader(dataset, DataConfig(prefetch_batches=1), batch_plan(4, 2, 1), 0, SEED, 0)
    consume(loader)
    loader.close()
    assert threading.active_count() == before
