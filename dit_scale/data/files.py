"""Bytes of a data set's shards from the nearest place that has them, and checked: disk, cache, storage.

A shard on this machine is read through a kept descriptor; of one that is not, single samples are read
from its storage. Whoever finds wrong bytes asks for them again here, in the storage itself.
"""

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dit_scale.data.cache import RETRY_PAUSES_S, ShardCache, ShardFile
from dit_scale.errors import DataError
from dit_scale.storage import Storage

OPEN_SHARDS = 512
"""Shards of one data set that a process keeps open; below the usual limit of 1024 files."""
READERS = 8
"""Requests to a remote storage at once; boto3 keeps ten connections."""

T = TypeVar("T")
Place = tuple[int, int, int, int, int, int]
"""Of a sample: id, shard, offset, length, CRC-32C, and the view that is wanted."""


class DamagedError(DataError):
    """A sample whose checksum stays wrong."""


class OpenShard:
    """A shard's file descriptor; closed when nobody holds it."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardFiles:
    """The shards of a data set by their numbers; threads may share it, and so may forked processes."""

    def __init__(self, storage: Storage, cache: ShardCache, shards: Sequence[ShardFile]) -> None:
        self.storage, self.cache, self.shards = storage, cache, shards
        # pread on kept descriptors, not mmap: a failing disk is then an error, not a dead process.
        self._open: dict[int, OpenShard] = {}
        self.waiting: dict[int | str, float] = {}
        """What is being read, sample ids and index files, and since when (time.monotonic)."""

    @property
    def is_remote(self) -> bool:
        """Whether shards have to be fetched to be on this machine."""
        return self.storage.local_path("shards") is None

    def open(self, shard: int) -> OpenShard | None:
        """The shard's file on this machine; None when only the storage has it.

        Raises DataError when the file of a local data set is missing or of another size.
        """
        found = self._open.get(shard)
        if found is None:
            file = self.shards[shard]
            path = self.storage.local_path(file.key)
            descriptor = self.cache.open(file) if path is None else _open_whole(file, str(path))
            if descriptor is None:
                return None
            for oldest in list(self._open)[: max(0, len(self._open) + 1 - OPEN_SHARDS)]:
                self._open.pop(oldest, None)
            found = self._open[shard] = OpenShard(descriptor)
        return found

    @contextmanager
    def waits_for(self, what: int | str) -> Iterator[None]:
        """Say in `waiting` what is being read."""
        self.waiting[what] = time.monotonic()
        try:
            yield
        finally:
            self.waiting.pop(what, None)

    def close_others(self, shards: Iterable[int]) -> None:
        """Let go of all shards but these, so that the cache may evict them."""
        for shard in set(self._open) - set(shards):
            self._open.pop(shard, None)

    def read_views(
        self, places: Iterable[Place], header: bytes, num_views: int, out_B2CHW: NDArray[np.float16]
    ) -> list[int]:
        """Read one view of each sample on this machine straight into its row of a contiguous array.

        Returns the rows for which that does not do: not on this machine, damaged, or of another npy
        header than `header`; what these rows hold is of no use.
        """
        assert out_B2CHW.flags.c_contiguous
        rows_BN = out_B2CHW.reshape(len(out_B2CHW), -1).view(np.uint8)
        head, aside = np.empty(len(header), np.uint8), np.empty(rows_BN.shape[1], np.uint8)
        size = len(header) + num_views * aside.size
        header_crc32c = google_crc32c.value(header)
        waiting, left = self.waiting, []
        for row, (sample_id, shard, offset, length, crc32c, view) in enumerate(places):
            waiting[sample_id] = time.monotonic()
            # The views that were not drawn are read as well, since the checksum covers all.
            parts: list[Any] = [head] + [aside] * num_views
            parts[1 + view] = rows_BN[row]
            try:
                opened = self.open(shard)
                if (
                    opened is None
                    or length != size
                    or os.preadv(opened.descriptor, parts, offset) != size
                    or head.tobytes() != header
                    or functools.reduce(google_crc32c.extend, parts[1:], header_crc32c) != crc32c
                ):
                    left.append(row)
            except OSError:  # a failing disk
                left.append(row)
            finally:
                waiting.pop(sample_id, None)
        return left

    def read(self, shard: int, offset: int, length: int, crc32c: int, where: str) -> bytes:
        """The bytes of a sample; when they are wrong, asked for again in the storage, a few times.

        A copy in the cache that gave wrong bytes is dropped. Raises DamagedError, which begins with
        `where`, when the checksum stays wrong; StorageError.
        """
        opened = self.open(shard)
        if opened is not None:
            with suppress(OSError):  # a failing disk
                npy = os.pread(opened.descriptor, length, offset)
                if google_crc32c.value(npy) == crc32c:
                    return npy
            self._open.pop(shard, None)
            if self.is_remote:
                self.cache.drop(self.shards[shard], opened.descriptor)
        for pause_s in RETRY_PAUSES_S:
            time.sleep(pause_s)
            npy = self.storage.read_range(self.shards[shard].key, offset, length)
            got = google_crc32c.value(npy)
            if got == crc32c:
                return npy
        raise DamagedError(
            f"{where}: expected CRC-32C {crc32c:08x}, got {got:08x}, {len(RETRY_PAUSES_S)} times; "
            "the shard is damaged, fetch or encode it again"
        )


def _open_whole(file: ShardFile, path: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"cannot open shard {file.name} at {path}: {error.strerror}") from None
    found = os.fstat(descriptor).st_size
    if found != file.size_bytes:
        os.close(descriptor)
        raise DataError(f"shard {file.name} at {path}: expected {file.size_bytes} bytes, got {found}")
    return descriptor


def concurrently(work: Callable[[T], object], items: Collection[T]) -> None:
    """Do `work` on every item, in up to READERS threads; raises the first error once all have ended.

    Threads of their own and not a pool's: a process can leave while one of them waits for a storage.
    """
    left, errors = deque(items), deque[Exception]()

    def run() -> None:
        with suppress(IndexError):
            while not errors:
                item = left.popleft()
                try:
                    work(item)
                except Exception as error:
                    errors.append(error)

    threads = [
        threading.Thread(target=run, name="reader", daemon=True) for _ in range(min(READERS, len(items)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
