"""The shard cache of a node: verified, downloaded once by several processes, within its budget."""

import hashlib
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from dit_scale.data import cache
from dit_scale.data.cache import NoRoomError, ShardCache, ShardFile
from dit_scale.errors import DataError
from dit_scale.storage import Storage, open_storage
from tests.support.s3 import BUCKET, s3_server
from tests.support.speed import scaled

SIZE = 100_000
URL = f"s3://{BUCKET}/set"
SPAWN = multiprocessing.get_context("spawn")


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


FILES = [
    ShardFile(f"{number:05d}", f"shards/{number:05d}.tar", SIZE, hashlib.sha256(content(number)).hexdigest())
    for number in range(4)
]


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for number, file in enumerate(FILES):
            open_storage(URL).write(file.key, content(number))
        yield


@pytest.fixture
def remote(server: None) -> Storage:
    return open_storage(URL)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RETRY_PAUSES_S", (0.0,) * 4)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tars(*numbers: int) -> list[str]:
    return sorted(f"{FILES[number].sha256}.tar" for number in numbers)


@contextmanager
def reading(shards: ShardCache, file: ShardFile) -> Iterator[int]:
    descriptor = shards.open(file)
    assert descriptor is not None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def when_reading(storage: Storage, change: Callable[[bytes], bytes]) -> list[tuple[str, int]]:
    """Pass all reads from the storage through `change`. Returns the growing list of requests."""
    requests: list[tuple[str, int]] = []
    read = storage.read_range

    def read_range(key: str, start: int, length: int) -> bytes:
        requests.append((key, start))
        return change(read(key, start, length))

    storage.read_range = read_range  # type: ignore[method-assign]
    return requests


@contextmanager
def processes(*targets: tuple[Callable[..., None], tuple[object, ...]]) -> Iterator[list[BaseProcess]]:
    started = [SPAWN.Process(target=target, args=args) for target, args in targets]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + scaled(300.0)
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


# Other processes


def fetch_all(folder: Path, log: Path, barrier: Barrier) -> None:
    remote = open_storage(URL)

    def note(data: bytes) -> bytes:
        with open(log, "a") as file:
            file.write(f"{requests[-1][0]}\n")
        return data

    requests = when_reading(remote, note)
    shards = ShardCache(remote, folder)
    barrier.wait()
    while not all(map(shards.fetch, FILES)):
        time.sleep(0.01)


def hang_in_mid_download(folder: Path, begun: Path) -> None:
    cache.PART_BYTES = SIZE // 4
    remote = open_storage(URL)

    def hang(data: bytes) -> bytes:
        if len(requests) == 3:
            begun.touch()
            time.sleep(1000)
        return data

    requests = when_reading(remote, hang)
    ShardCache(remote, folder).fetch(FILES[0])


def hold_open(folder: Path, opened: Path) -> None:
    assert ShardCache(open_storage(URL), folder).open(FILES[0]) is not None
    opened.touch()
    time.sleep(1000)


def fetch_with_little_disk(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
    with pytest.raises(NoRoomError, match=r"cannot keep shard 00000 .*: File too large; set data.cache_dir"):
        ShardCache(open_storage(URL), folder).fetch(FILES[0])


# Verified


def test_a_cached_shard_is_named_by_its_digest(remote: Storage, tmp_path: Path) -> None:
    shards = ShardCache(remote, tmp_path / "new" / "folder")
    assert shards.open(FILES[2]) is None
    assert not shards.holds(FILES[2])
    assert shards.fetch(FILES[2])
    assert shards.holds(FILES[2])
    with reading(shards, FILES[2]) as descriptor:
        assert os.pread(descriptor, SIZE + 1, 0) == content(2)
    assert names(tmp_path / "new" / "folder") == tars(2)


def test_a_cached_shard_is_not_fetched_again_even_by_a_later_run(remote: Storage, tmp_path: Path) -> None:
    assert ShardCache(remote, tmp_path).fetch(FILES[0])
    requests = when_reading(remote, lambda data: data)
    assert ShardCache(remote, tmp_path).fetch(FILES[0])
    assert requests == []


def test_a_shard_damaged_in_transit_is_fetched_again(remote: Storage, tmp_path: Path) -> None:
    requests = when_reading(remote, lambda data: data if len(requests) == 3 else b"\0" + data[1:])
    shards = ShardCache(remote, tmp_path)
    assert shards.fetch(FILES[1])
    assert len(requests) == 3
    with reading(shards, FILES[1]) as descriptor:
        assert os.pread(descriptor, SIZE, 0) == content(1)


def test_a_shard_that_is_damaged_every_time_is_not_cached(remote: Storage, tmp_path: Path) -> None:
    requests = when_reading(remote, lambda data: data[:-1] + b"\0")
    with pytest.raises(
        DataError, match=r"00001.tar: expected SHA-256 .*, got .*, 4 times; the shard is not cached"
    ):
        ShardCache(remote, tmp_path).fetch(FILES[1])
    assert len(requests) == 4
    assert names(tmp_path) == []


@pytest.mark.parametrize("size_bytes", [0, SIZE - 1, SIZE + 1])
def test_a_file_of_another_size_is_dropped_when_it_is_opened(
    remote: Storage, tmp_path: Path, size_bytes: int
) -> None:
    shards = ShardCache(remote, tmp_path)
    shards.fetch(FILES[0])
    os.truncate(tmp_path / tars(0)[0], size_bytes)
    assert shards.open(FILES[0]) is None
    assert names(tmp_path) == []


def test_dropping_a_damaged_file_spares_its_replacement(remote: Storage, tmp_path: Path) -> None:
    shards = ShardCache(remote, tmp_path)
    shards.fetch(FILES[0])
    with reading(shards, FILES[0]) as damaged:
        shards.drop(FILES[0], damaged)
        assert names(tmp_path) == []
        assert shards.fetch(FILES[0])
        shards.drop(FILES[0], damaged)
        assert names(tmp_path) == tars(0)


# Once per node


def test_concurrent_processes_download_each_shard_once(server: None, tmp_path: Path) -> None:
    log, barrier = tmp_path / "log", SPAWN.Barrier(4)
    with processes(*[(fetch_all, (tmp_path / "cache", log, barrier))] * 4) as started:
        for process in started:
            process.join(300)
        assert [process.exitcode for process in started] == [0] * 4
    assert sorted(log.read_text().split()) == [file.key for file in FILES]
    assert names(tmp_path / "cache") == tars(0, 1, 2, 3)


@pytest.mark.parametrize("is_open", [True, False], ids=["after its file was opened", "before"])
def test_a_download_that_another_process_finishes_meanwhile_is_not_repeated(
    is_open: bool, remote: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, shard = (tmp_path / f"{FILES[0].sha256}.{suffix}" for suffix in ("tmp", "tar"))
    part.write_bytes(content(0))
    when = "_locked" if is_open else "_opened"
    act = getattr(cache, when)

    def finish_first(*args: Any) -> Any:
        if part.exists() and (is_open or args[0] == part):
            part.rename(shard)
        return act(*args)

    monkeypatch.setattr(cache, when, finish_first)
    requests = when_reading(remote, lambda data: data)
    assert ShardCache(remote, tmp_path).fetch(FILES[0])
    assert requests == []
    assert shard.read_bytes() == content(0)
    assert names(tmp_path) == tars(0)


def test_a_killed_download_is_taken_over(remote: Storage, tmp_path: Path) -> None:
    folder, begun = tmp_path / "cache", tmp_path / "begun"
    shards = ShardCache(remote, folder)
    with processes((hang_in_mid_download, (folder, begun))) as (process,):
        wait_for(begun)
        assert not shards.fetch(FILES[0])
        assert names(folder) == [f"{FILES[0].sha256}.tmp"]
        process.kill()
        process.join()
        assert shards.fetch(FILES[0])
    assert names(folder) == tars(0)
    with reading(shards, FILES[0]) as descriptor:
        assert os.pread(descriptor, SIZE, 0) == content(0)


def test_the_leftover_of_a_killed_download_is_deleted_by_the_next_one(
    remote: Storage, tmp_path: Path
) -> None:
    folder, begun = tmp_path / "cache", tmp_path / "begun"
    with processes((hang_in_mid_download, (folder, begun))) as (process,):
        wait_for(begun)
        assert ShardCache(remote, folder).fetch(FILES[1])
        assert names(folder) == sorted([f"{FILES[0].sha256}.tmp", *tars(1)])
        process.kill()
        process.join()
    assert ShardCache(remote, folder).fetch(FILES[2])
    assert names(folder) == tars(1, 2)


def test_a_download_can_be_stopped(remote: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PART_BYTES", SIZE // 4)
    stop = Event()
    requests = when_reading(remote, lambda data: (stop.set() if len(requests) == 2 else None, data)[1])
    assert not ShardCache(remote, tmp_path).fetch(FILES[0], stop=stop)
    assert len(requests) == 2
    assert names(tmp_path) == []


# Within the budget


def test_the_least_recently_opened_shard_is_evicted(remote: Storage, tmp_path: Path) -> None:
    shards = ShardCache(remote, tmp_path, limit_bytes=2 * SIZE)
    (tmp_path / "notes.txt").write_text("somebody else's")
    for number in (0, 1):
        shards.fetch(FILES[number])
        os.utime(tmp_path / tars(number)[0], (number, number))
    with reading(shards, FILES[0]):
        pass
    assert shards.fetch(FILES[2])
    assert names(tmp_path) == sorted([*tars(0, 2), "notes.txt"])


def test_a_shard_that_another_process_reads_is_not_evicted(remote: Storage, tmp_path: Path) -> None:
    folder, opened = tmp_path / "cache", tmp_path / "opened"
    shards = ShardCache(remote, folder, limit_bytes=SIZE)
    shards.fetch(FILES[0])
    with processes((hold_open, (folder, opened))) as (process,):
        wait_for(opened)
        with pytest.raises(NoRoomError, match=r"no room for shard 00001 .* within data.cache_bytes=100000"):
            shards.fetch(FILES[1])
        assert names(folder) == tars(0)
        process.kill()
        process.join()
        assert shards.fetch(FILES[1])
    assert names(folder) == tars(1)


def test_wanted_shards_are_not_evicted_and_no_shard_needlessly(remote: Storage, tmp_path: Path) -> None:
    shards = ShardCache(remote, tmp_path, limit_bytes=2 * SIZE)
    shards.fetch(FILES[0])
    shards.fetch(FILES[1])
    with pytest.raises(NoRoomError):
        shards.fetch(FILES[2], keep=FILES[:2])
    with reading(shards, FILES[0]), pytest.raises(NoRoomError):
        shards.fetch(FILES[2]._replace(size_bytes=2 * SIZE))
    assert names(tmp_path) == tars(0, 1)
    assert shards.fetch(FILES[2], keep=[FILES[0]])
    assert names(tmp_path) == tars(0, 2)


def test_a_running_download_counts_with_its_full_size(remote: Storage, tmp_path: Path) -> None:
    folder, begun = tmp_path / "cache", tmp_path / "begun"
    shards = ShardCache(remote, folder, limit_bytes=2 * SIZE - 1)
    with processes((hang_in_mid_download, (folder, begun))):
        wait_for(begun)
        with pytest.raises(NoRoomError):
            shards.fetch(FILES[1])


def test_without_a_limit_nothing_is_evicted(remote: Storage, tmp_path: Path) -> None:
    shards = ShardCache(remote, tmp_path)
    assert all(map(shards.fetch, FILES))
    assert names(tmp_path) == tars(0, 1, 2, 3)


def test_a_full_disk_raises_no_room_and_leaves_no_file(server: None, tmp_path: Path) -> None:
    with processes((fetch_with_little_disk, (tmp_path,))) as (process,):
        process.join(300)
        assert process.exitcode == 0
    assert names(tmp_path) == []


def test_an_unusable_folder_raises_no_room(remote: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shards = ShardCache(remote, tmp_path / "file" / "folder")
    with pytest.raises(NoRoomError, match=r"cannot keep shard 00000 .*: Not a directory; set data.cache_dir"):
        shards.fetch(FILES[0])
    assert shards.open(FILES[0]) is None
