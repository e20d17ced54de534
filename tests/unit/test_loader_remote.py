"""The loader on S3: it never waits for entire shards, fills the cache in parallel, tolerates failures."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_scale.config import DataConfig
from dit_scale.data import download, files
from dit_scale.data.batch_plan import batch_plan
from dit_scale.data.cache import ShardFile
from dit_scale.data.loader import Loader
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.data.order import Order
from dit_scale.data.shards import LatentDataset
from dit_scale.errors import DataError
from dit_scale.storage import open_storage
from tests.support.latents import write_latents
from tests.support.micro_batches import read_micro_batch
from tests.support.s3 import BUCKET, s3_server
from tests.support.speed import scaled

NUM, SEED, SIZES = 40, 7, [8] * 5
PLAN = batch_plan(global_batch=4, micro_batch=4, world=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, num=NUM, shard_samples=8)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[None]:
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        source, target = open_storage(folder), open_storage(f"s3://{BUCKET}/set")
        for key, _ in source.list():
            target.write(key, source.read(key))
        yield


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "LOOK_AGAIN_S", 0.02)
    monkeypatch.setattr(files, "RETRY_PAUSES_S", (0.0, 0.0))


@pytest.fixture
def remote(server: None, tmp_path: Path) -> LatentDataset:
    return LatentDataset.open(f"s3://{BUCKET}/set", tmp_path / "cache")


@contextmanager
def loading(dataset: LatentDataset, **config: object) -> Iterator[Loader]:
    loader = Loader(dataset, DataConfig.model_validate(config), PLAN, rank=0, seed=SEED, first_step=0)
    try:
        yield loader
    finally:
        loader.close()


class Requests(list[tuple[str, int]]):
    """(key, bytes) of each range requested from a data set's storage, in order; `before` is called first."""

    def __init__(self, dataset: LatentDataset, before: Callable[[str, int], None] = lambda *_: None) -> None:
        read = dataset.storage.read_range

        def read_range(key: str, start: int, length: int) -> bytes:
            self.append((key, length))
            before(key, length)
            return read(key, start, length)

        dataset.storage.read_range = read_range  # type: ignore[method-assign]
        self._shard_bytes = dataset.info.shards[0].bytes

    def whole(self) -> list[int]:
        return [int(key[-9:-4]) for key, length in self if length == self._shard_bytes]

    def samples(self) -> int:
        return sum(length < self._shard_bytes for _, length in self)


def assert_right(batches: list[MicroBatch], dataset: LatentDataset) -> None:
    for step, batch in enumerate(batches):
        expected = read_micro_batch(dataset, np.arange(4 * step, 4 * step + 4), 4, SEED, flip=True)
        assert torch.equal(batch.moments_B2CHW, expected.moments_B2CHW)
        assert torch.equal(batch.y_B, expected.y_B)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + scaled(300.0)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def all_cached(dataset: LatentDataset, shards: Sequence[ShardFile] = ()) -> bool:
    return all(map(dataset.cache.holds, shards or dataset.files.shards))


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # renamed or evicted in the meantime
            total += path.stat().st_size
    return total


def test_micro_batches_come_before_any_shard_is_cached_and_then_from_the_cache(
    remote: LatentDataset, folder: Path
) -> None:
    may_download = threading.Event()
    whole = remote.info.shards[0].bytes
    requests = Requests(remote, lambda _, length: length < whole or may_download.wait(60))
    with loading(remote, prefetch_batches=1) as loader:
        batches = [next(loader) for _ in range(5)]
        assert not any(map(remote.cache.holds, remote.files.shards))
        may_download.set()
        wait_until(lambda: all_cached(remote))
        batches += [next(loader) for _ in range(5)]  # prefetched earlier
        asked = requests.samples()
        batches += [next(loader) for _ in range(10)]
        assert requests.samples() == asked
        assert loader.notes() == []
    assert requests.whole() == [0, 1, 2, 3, 4]
    assert_right(batches, LatentDataset.open(folder))


def test_samples_of_a_micro_batch_are_requested_concurrently(remote: LatentDataset, folder: Path) -> None:
    together = threading.Barrier(4)  # of the four samples of a batch
    Requests(remote, lambda *_: together.wait(60))
    batch = read_micro_batch(remote, np.arange(4), 4, SEED, flip=True)
    assert_right([batch], LatentDataset.open(folder))


def test_a_later_run_finds_the_cache_filled(remote: LatentDataset, folder: Path) -> None:
    with loading(remote):
        wait_until(lambda: all_cached(remote))
    again = LatentDataset.open(remote.storage.url, remote.cache.folder)
    requests = Requests(again)
    with loading(again) as loader:
        assert_right([next(loader) for _ in range(20)], LatentDataset.open(folder))
    assert requests == []


def test_a_damaged_cached_copy_is_replaced(remote: LatentDataset, folder: Path) -> None:
    with loading(remote) as loader:
        wait_until(lambda: all_cached(remote))
        for path in remote.cache.folder.iterdir():
            with open(path, "r+b") as file:
                file.write(bytes(path.stat().st_size))
        batches = [next(loader) for _ in range(30)]
        assert loader.quarantined() == {}
        wait_until(lambda: all_cached(remote))
        assert_right(batches, LatentDataset.open(folder))
    dataset = LatentDataset.open(remote.storage.url, remote.cache.folder)
    requests = Requests(dataset)
    with loading(dataset) as loader:
        assert_right([next(loader) for _ in range(10)], LatentDataset.open(folder))
    assert requests == []


@pytest.mark.parametrize("budget_shards", [4, 0])
def test_windows_are_fetched_in_order_within_the_budget(
    server: None, folder: Path, tmp_path: Path, budget_shards: int
) -> None:
    limit = budget_shards * LatentDataset.open(folder).info.shards[0].bytes
    dataset = LatentDataset.open(f"s3://{BUCKET}/set", tmp_path, limit)
    requests = Requests(dataset)
    order = Order(NUM, SEED, SIZES, window_shards=2)
    labels: list[int] = []
    with loading(dataset, window_shards=2, prefetch_batches=1) as loader:
        for step in range(30):  # three epochs
            labels += next(loader).y_B.tolist()
            if step % 10 in (0, 4):  # the loader is two steps ahead, in the same window of four
                ahead = [dataset.files.shards[shard] for shard in order.shards_ahead(4 * step)]
                wait_until(partial(all_cached, dataset, ahead))
            assert not limit or bytes_in(tmp_path) <= limit
        assert loader.notes() == []
    assert labels == (order.ids(np.arange(120)) % 10).tolist()
    windows = [*order.shards_ahead(0), *order.shards_ahead(16)[2:]]
    assert requests.whole()[:5] == windows[:5]
    assert (len(requests.whole()) > 5) == bool(limit)


def test_a_cache_too_small_for_two_windows_is_reported_and_loses_no_sample(
    server: None, folder: Path, tmp_path: Path
) -> None:
    shard_bytes = LatentDataset.open(folder).info.shards[0].bytes
    dataset = LatentDataset.open(f"s3://{BUCKET}/set", tmp_path, 3 * shard_bytes)
    with loading(dataset, window_shards=2) as loader:
        (note,) = loader.notes()
        assert f"data.cache_bytes={3 * shard_bytes} is too small for two windows of 2 shards" in note
        order = Order(NUM, SEED, SIZES, 2)
        labels = torch.cat([next(loader).y_B for _ in range(20)])
        assert labels.tolist() == (order.ids(np.arange(80)) % 10).tolist()


def test_a_full_cache_is_reported_once_and_loses_no_sample(
    server: None, folder: Path, tmp_path: Path
) -> None:
    shard_bytes = LatentDataset.open(folder).info.shards[0].bytes
    dataset = LatentDataset.open(f"s3://{BUCKET}/set", tmp_path, 2 * shard_bytes)
    requests = Requests(dataset)
    notes: list[str] = []
    with loading(dataset) as loader:
        wait_until(lambda: bool(notes.extend(loader.notes()) or notes))
        assert_right([next(loader) for _ in range(20)], LatentDataset.open(folder))
        notes += loader.notes()
    assert len(notes) == 1
    assert "no room for shard 00002" in notes[0]
    assert "read from the storage one by one" in notes[0]
    assert requests.whole() == [0, 1]  # wanted shards are not evicted for each other


def test_an_unusable_cache_folder_loses_no_sample(server: None, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    dataset = LatentDataset.open(f"s3://{BUCKET}/set", tmp_path / "file")
    notes: list[str] = []
    with loading(dataset) as loader:
        wait_until(lambda: bool(notes.extend(loader.notes()) or notes))
        assert_right([next(loader) for _ in range(5)], LatentDataset.open(folder))
    assert "cannot keep shard 00000" in notes[0]


def test_a_damaged_shard_is_read_by_sample_and_the_others_are_cached(
    server: None, folder: Path, tmp_path: Path
) -> None:
    """A byte between the samples is wrong: so is the shard's digest, but no checksum of a sample."""
    source, target = open_storage(folder), open_storage(f"s3://{BUCKET}/odd")
    for key, _ in source.list():
        data = bytearray(source.read(key))
        if key == "shards/00003.tar":
            data[-1] ^= 1
        target.write(key, bytes(data))
    dataset = LatentDataset.open(target.url, tmp_path)
    notes: list[str] = []
    with loading(dataset) as loader:
        wait_until(lambda: bool(notes.extend(loader.notes()) or notes))
        wait_until(lambda: sum(map(dataset.cache.holds, dataset.files.shards)) == 4)
        assert_right([next(loader) for _ in range(20)], LatentDataset.open(folder))
    assert len(notes) == 1
    assert "odd/shards/00003.tar: expected SHA-256" in notes[0]


def test_a_storage_that_hangs_is_an_error_that_names_the_sample(remote: LatentDataset) -> None:
    answers = threading.Event()
    requests = Requests(remote, lambda *_: answers.wait(60))
    ids = Order(NUM, SEED).ids(np.arange(4))
    names = "|".join(f"shard {sample_id // 8:05d}, sample {sample_id}" for sample_id in ids)
    with loading(remote, deadline_s=0.2) as loader:
        wait_until(lambda: requests.samples() > 0)
        with pytest.raises(DataError, match=rf"step 0, micro-batch 0: not read within .* for ({names}) for "):
            next(loader)
        answers.set()


def test_damage_in_the_storage_is_replaced(server: None, folder: Path, tmp_path: Path) -> None:
    source, target = open_storage(folder), open_storage(f"s3://{BUCKET}/damaged")
    whole = LatentDataset.open(folder)
    for key, _ in source.list():
        data = bytearray(source.read(key))
        if key == "shards/00002.tar":
            data[int(whole.records(2)[5]["offset"]) + 300] ^= 1
        target.write(key, bytes(data))
    dataset = LatentDataset.open(target.url, tmp_path)
    with loading(dataset, damaged="quarantine") as loader:
        labels = torch.cat([next(loader).y_B for _ in range(20)])
        assert list(loader.quarantined()) == [21]
    ids = Order(NUM, SEED).ids(np.arange(80))
    assert labels.tolist() == (np.where(ids == 21, 22, ids) % 10).tolist()
