"""Micro-batches of a rank: which samples, which views, and what happens if a read fails."""

import itertools
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from dit_scale.config import DataConfig
from dit_scale.data import files
from dit_scale.data.batch_plan import BatchPlan, batch_plan
from dit_scale.data.loader import BLOCK_SAMPLES, Loader
from dit_scale.data.micro_batch import MicroBatch, draw_latents
from dit_scale.data.order import Order, Ranges, positions_of, sample_ids
from dit_scale.data.shards import LatentDataset
from dit_scale.errors import ConfigError, DataError
from tests.support import philox
from tests.support.latents import write_latents
from tests.support.micro_batches import read_micro_batch

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
    dataset: LatentDataset,
    plan: BatchPlan,
    rank: int = 0,
    first_step: int = 0,
    excluded: Ranges = (),
    quarantined: Iterable[int] = (),
    **config: object,
) -> Iterator[Loader]:
    knobs = DataConfig.model_validate(config)
    loader = Loader(
        dataset,
        knobs,
        plan,
        rank=rank,
        seed=SEED,
        first_step=first_step,
        excluded=excluded,
        quarantined=quarantined,
    )
    try:
        yield loader
    finally:
        loader.close()


def take(loader: Loader, count: int) -> list[MicroBatch]:
    return list(itertools.islice(loader, count))


def views_at(positions: np.ndarray) -> list[int]:
    return [philox.words(SEED, philox.VIEW, position, 1)[0] * 2 >> 32 for position in positions.tolist()]


def assert_same(one: MicroBatch, other: MicroBatch) -> None:
    for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("world", [1, 3, 7])
def test_a_step_has_the_same_positions_at_any_world_size(dataset: LatentDataset, world: int) -> None:
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
    views = views_at(positions)
    for position, sample_id in enumerate(sample_ids(positions, NUM, SEED)):
        moments, label = dataset.read(int(sample_id))
        assert real[position][0] == label
        assert np.array_equal(real[position][1], moments[views[position]])


def test_padding_has_weight_0(dataset: LatentDataset) -> None:
    plan = batch_plan(
        global_batch=7, micro_batch=2, world=3
    )  # shares of 3, 2 and 2 samples in two micro-steps of two
    weights = []
    for rank in range(3):
        with loading(dataset, plan, rank) as loader:
            weights.append([batch.weight_B.tolist() for batch in take(loader, 2)])
    assert weights == [[[1, 1], [1, 0]], [[1, 1], [0, 0]], [[1, 1], [0, 0]]]


def test_padding_repeats_the_last_sample_of_the_rank(dataset: LatentDataset) -> None:
    plan = batch_plan(global_batch=7, micro_batch=2, world=3)
    assert plan.indices(0, first_step=4).tolist() == [[[28, 29], [30, 30]]]
    assert plan.num_real(0) == [2, 1]


@pytest.mark.parametrize("prefetch", [1, 2, 9])
def test_prefetching_changes_nothing(dataset: LatentDataset, prefetch: int) -> None:
    plan = batch_plan(global_batch=6, micro_batch=2, world=1)
    with loading(dataset, plan, prefetch_batches=prefetch) as loader:
        batches = take(loader, 12)
    for batch, positions in zip(batches, np.arange(24).reshape(12, 2), strict=True):
        assert_same(batch, read_micro_batch(dataset, positions, 2, SEED, flip=True))


def test_a_later_start_continues_the_sequence_of_an_earlier_one(dataset: LatentDataset) -> None:
    plan = batch_plan(global_batch=6, micro_batch=2, world=2)
    with loading(dataset, plan, rank=1) as from_start, loading(dataset, plan, 1, first_step=3) as later:
        for one, other in zip(take(from_start, 12)[6:], take(later, 6), strict=True):
            assert_same(one, other)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world"),
    [(1024, 512, 1), (1000, 300, 1), (1500, 256, 2), (BLOCK_SAMPLES, 4096, 1), (5000, 5000, 1), (200, 30, 3)],
)
def test_no_step_is_skipped_or_repeated_at_the_end_of_a_block(
    dataset: LatentDataset, global_batch: int, micro_batch: int, world: int
) -> None:
    """Several blocks of BLOCK_SAMPLES, from the first step and from a step inside a block."""
    plan = batch_plan(global_batch, micro_batch, world)
    rank, share = world - 1, -(-global_batch // world)
    mine = np.arange(global_batch - global_batch // world, global_batch)
    num_steps = 2 * max(1, BLOCK_SAMPLES // share) + 3
    for first_step in (0, 2):
        with loading(dataset, plan, rank, first_step) as loader:
            for step in range(first_step, num_steps):
                batches = take(loader, plan.micro_steps)
                real = torch.cat([batch.weight_B for batch in batches]) > 0
                positions, labels, moments = (
                    torch.cat([getattr(batch, name) for batch in batches])[real].numpy()
                    for name in ("position_B", "y_B", "moments_B2CHW")
                )
                assert positions.tolist() == (step * global_batch + mine).tolist()
                ids = sample_ids(positions, NUM, SEED)
                assert labels.tolist() == (ids % 10).tolist()
                views = views_at(positions[-3:])
                for sample_id, view, drawn in zip(ids[-3:].tolist(), views, moments[-3:], strict=True):
                    assert np.array_equal(drawn, dataset.read(sample_id)[0][view])


@pytest.mark.parametrize(("flip", "low", "high"), [(True, 430, 570), (False, 0, 0)])
def test_the_mirrored_view_is_drawn_half_of_the_time(
    dataset: LatentDataset, flip: bool, low: int, high: int
) -> None:
    positions = np.arange(1000)
    batch = read_micro_batch(dataset, positions, 1000, SEED, flip)
    ids = sample_ids(positions, NUM, SEED)
    mirrored = 0
    for i, sample_id in enumerate(ids):
        image, mirror = dataset.read(int(sample_id))[0]
        drawn = batch.moments_B2CHW[i].numpy()
        assert np.array_equal(drawn, image) != np.array_equal(drawn, mirror)
        mirrored += np.array_equal(drawn, mirror)
    assert low <= mirrored <= high


def test_latents_are_drawn_from_each_samples_posterior(dataset: LatentDataset) -> None:
    batch = read_micro_batch(dataset, np.arange(100, 108), 8, SEED, flip=True)
    z_BCHW = draw_latents(batch, SEED, scale=0.5)
    mean, std = batch.moments_B2CHW.double().chunk(2, dim=1)
    drawn = [philox.normals(SEED, philox.POSTERIOR, position, 64) for position in range(100, 108)]
    noise = torch.tensor(drawn, dtype=torch.float64).reshape(8, 4, 4, 4)
    assert z_BCHW.dtype == torch.float32
    torch.testing.assert_close(z_BCHW.double(), 0.5 * (mean + std * noise), rtol=1e-6, atol=1e-6)
    alone = read_micro_batch(dataset, np.array([103]), 1, SEED, flip=True)
    assert torch.equal(draw_latents(alone, SEED, 0.5)[0], z_BCHW[3])


def test_a_micro_batch_moves_to_the_device(dataset: LatentDataset) -> None:
    batch = read_micro_batch(dataset, np.arange(4), 3, SEED, flip=True)
    assert_same(batch.to(torch.device("cpu")), batch)
    assert {tensor.device.type for tensor in vars(batch.to(torch.device("meta"))).values()} == {"meta"}


@pytest.mark.parametrize("world", [1, 3])
def test_excluded_positions_are_skipped(dataset: LatentDataset, world: int) -> None:
    plan = batch_plan(global_batch=6, micro_batch=2, world=world)
    excluded = ((3, 4), (8, 20))
    positions = positions_of(np.arange(36), excluded)
    seen: dict[int, torch.Tensor] = {}
    for rank in range(world):
        with loading(dataset, plan, rank, excluded=excluded) as loader:
            for batch in take(loader, 6 * plan.micro_steps):
                for i in np.flatnonzero(batch.weight_B.numpy()):
                    seen[int(batch.position_B[i])] = batch.moments_B2CHW[i]
    assert sorted(seen) == positions.tolist()
    alone = read_micro_batch(dataset, positions, 36, SEED, flip=True)
    for position, moments in zip(positions.tolist(), alone.moments_B2CHW, strict=True):
        assert torch.equal(seen[position], moments)


@pytest.mark.parametrize("window_shards", [1, 2])
def test_windows_are_read_in_order(dataset: LatentDataset, window_shards: int) -> None:
    order = Order(NUM, SEED, [16, 16, 8], window_shards)
    with loading(dataset, batch_plan(8, 4, 1), window_shards=window_shards) as loader:
        batches = take(loader, 30)
        assert loader.sample_ids(3).tolist() == order.ids(np.arange(24, 32)).tolist()
    ids = order.ids(np.arange(120))
    assert torch.cat([batch.y_B for batch in batches]).tolist() == (ids % 10).tolist()
    views = views_at(np.arange(120))
    for i, moments in enumerate(torch.cat([batch.moments_B2CHW for batch in batches])):
        assert np.array_equal(moments.numpy(), dataset.read(int(ids[i]))[0][views[i]])


def test_returned_micro_batches_never_change(dataset: LatentDataset) -> None:
    with loading(dataset, batch_plan(4, 4, 1), prefetch_batches=1) as loader:
        batches = take(loader, 30)
        copies = [batch.moments_B2CHW.clone() for batch in batches]
        take(loader, 30)
    assert all(torch.equal(batch.moments_B2CHW, copy) for batch, copy in zip(batches, copies, strict=True))


def test_missing_views_are_not_drawn(tmp_path: Path) -> None:
    write_latents(tmp_path, num=4, views=1)
    dataset = LatentDataset.open(tmp_path)
    with pytest.raises(ConfigError, match=r"has no mirrored views: set data.horizontal_flip=false"):
        Loader(dataset, DataConfig(), batch_plan(2, 2, 1), rank=0, seed=SEED, first_step=0)
    with loading(dataset, batch_plan(2, 2, 1), horizontal_flip=False) as loader:
        batch = next(loader)
    ids = sample_ids(np.arange(2), 4, SEED)
    assert np.array_equal(batch.moments_B2CHW[1].numpy(), dataset.read(int(ids[1]))[0][0])


# Damage


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RETRY_PAUSES_S", (0.0, 0.0))


def damage(folder: Path, *sample_ids: int) -> LatentDataset:
    """Flip a bit of each of these samples and open the data set in this folder."""
    whole = LatentDataset.open(folder)
    for sample_id in sample_ids:
        at = whole.locate(sample_id)
        tar = folder / whole.info.shards[at.shard].tar_key
        data = bytearray(tar.read_bytes())
        data[int(whole.records(at.shard)[at.row]["offset"]) + 200] ^= 4
        tar.write_bytes(data)
    return LatentDataset.open(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "set"))


def test_damage_raises_from_the_next_that_would_have_returned_it(copy: Path, no_pauses: None) -> None:
    position = int(np.flatnonzero(sample_ids(np.arange(NUM), NUM, SEED) == 21)[0])
    with loading(damage(copy, 21), batch_plan(1, 1, 1)) as loader:
        assert [int(batch.position_B[0]) for batch in take(loader, position)] == list(range(position))
        for _ in range(2):  # the error is raised again
            with pytest.raises(DataError, match=r"shard 00001, sample 21: .* or set data.damaged=quarantine"):
                next(loader)


def test_a_missing_shard_is_an_error_too(copy: Path) -> None:
    for tar in (copy / "shards").glob("*.tar"):
        tar.unlink()
    with loading(LatentDataset.open(copy), batch_plan(4, 4, 1), damaged="quarantine") as loader:
        with pytest.raises(DataError, match="cannot open shard"):
            next(loader)


DAMAGED = {21: 22, 6: 8, 7: 8, 39: 1, 0: 1}
"""Sample id => its replacement: the next intact sample, where 0 follows 39."""


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("known", [(), (0, 7)])
def test_damaged_samples_are_replaced_by_the_next_intact_one(
    dataset: LatentDataset, copy: Path, no_pauses: None, world: int, known: tuple[int, ...]
) -> None:
    plan = batch_plan(global_batch=7, micro_batch=2, world=world)
    steps = 12  # a little more than two epochs
    positions = np.arange(7 * steps)
    ids = [DAMAGED.get(int(sample_id), int(sample_id)) for sample_id in sample_ids(positions, NUM, SEED)]
    views = views_at(positions)
    real: list[int] = []
    found: dict[int, str] = {}
    damaged = damage(copy, *DAMAGED)
    for rank in range(world):
        with loading(damaged, plan, rank, quarantined=known, damaged="quarantine") as loader:
            for batch in take(loader, steps * plan.micro_steps):
                for i in np.flatnonzero(batch.weight_B.numpy()):
                    position = int(batch.position_B[i])
                    moments, label = dataset.read(ids[position])
                    assert int(batch.y_B[i]) == label
                    assert np.array_equal(batch.moments_B2CHW[i].numpy(), moments[views[position]])
                    real.append(position)
            found |= loader.quarantined()
            loader.quarantined().clear()  # a copy
            assert world > 1 or loader.quarantined().keys() == DAMAGED.keys() - set(known)
            if world == 1:
                assert loader.sample_ids(4).tolist() == ids[28:35]
    assert sorted(real) == positions.tolist()
    assert found.keys() == DAMAGED.keys() - set(known)
    assert all(f"sample {sample_id}: expected CRC-32C" in reason for sample_id, reason in found.items())


def test_known_damaged_samples_are_not_read(dataset: LatentDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = LatentDataset.read_views

    def read_views(self: LatentDataset, ids_B: np.ndarray, *rest: np.ndarray) -> object:
        read.extend(ids_B.tolist())
        return real(self, ids_B, *rest)

    monkeypatch.setattr(LatentDataset, "read_views", read_views)
    with loading(dataset, batch_plan(8, 4, 1), quarantined=DAMAGED, damaged="stop") as loader:
        take(loader, 20)
        assert loader.quarantined() == {}
    assert set(read) == set(range(NUM)) - DAMAGED.keys()


def test_too_much_damage_is_an_error(copy: Path, no_pauses: None) -> None:
    with loading(
        damage(copy, *range(5)), batch_plan(4, 4, 1), quarantined=range(20, 26), damaged="quarantine"
    ) as loader:
        with pytest.raises(DataError, match=r"11 of 40 samples are damaged.* sample [0-4]: expected CRC"):
            take(loader, 10)


@pytest.mark.parametrize("damaged", ["stop", "quarantine"])
def test_too_much_known_damage_is_an_immediate_error(
    dataset: LatentDataset, damaged: Literal["stop", "quarantine"]
) -> None:
    config = DataConfig(damaged=damaged)
    with pytest.raises(DataError, match=r"11 of 40 samples are damaged, and at most 10 may be"):
        Loader(dataset, config, batch_plan(4, 4, 1), rank=0, seed=SEED, first_step=0, quarantined=range(11))


def test_an_overdue_micro_batch_is_an_error_that_names_the_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = LatentDataset.open(copy)
    asked, answers, read = threading.Event(), threading.Event(), dataset.storage.read
    monkeypatch.setattr(dataset.storage, "read", lambda key: (asked.set(), answers.wait(60), read(key))[2])
    plan = batch_plan(1, 1, 1)
    first = int(sample_ids(np.array([15]), NUM, SEED)[0])
    with loading(dataset, plan, first_step=15, deadline_s=0.2) as loader:
        name = f"{dataset.locate(first).shard:05d}.idx"
        message = (
            rf"step 15, micro-batch 0: not read within data.deadline_s=0.2 s; waiting for .*{name} for \d"
        )
        assert asked.wait(60)
        with pytest.raises(DataError, match=message):
            next(loader)
        answers.set()
        with pytest.raises(DataError, match=message):  # the error is raised again
            next(loader)


@pytest.mark.parametrize("consume", [lambda _: None, next], ids=["queue full", "after one"])
def test_close_stops_the_thread(dataset: LatentDataset, consume: Callable[[Loader], object]) -> None:
    loader = Loader(
        dataset, DataConfig(prefetch_batches=1), batch_plan(4, 2, 1), rank=0, seed=SEED, first_step=0
    )
    consume(loader)
    loader.close()
    assert not loader._prefetch._thread.is_alive()
