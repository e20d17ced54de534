"""Bytes of a data set's shards from the nearest copy, verified: local disk, cache, storage.

A shard on this machine is read through an open descriptor. Otherwise single samples are read from the
storage. Wrong bytes are read again from the storage itself.
"""

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dit_scale.data.cache import RETRY_PAUSES_S, ShardCache, ShardFile
from dit_scale.errors import DataError
from dit_scale.storage import Storage

OPEN_SHARDS = 512
"""Shards that a process keeps open per data set; below the usual limit of 1024 files."""
READERS = 8
"""Concurrent requests to a remote storage; boto3 keeps ten connections."""

T = TypeVar("T")


class SampleLocation(NamedTuple):
    """Where a sample is stored, and which of its views is wanted."""

    sample_id: int
    shard: int
    offset: int
    """First byte of its npy file within the tar."""
    length: int
    """Size of its npy file in bytes."""
    crc32c: int
    view: int


class DamagedError(DataError):
    """The checksum of a sample is wrong in every read."""


class OpenShard:
    """A shard's file descriptor, closed with the last reference."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardFiles:
    """The shards of a data set, by number. Threads and forked processes may share it."""

    def __init__(self, storage: Storage, cache: ShardCache, shards: Sequence[ShardFile]) -> None:
        self.storage, self.cache, self.shards = storage, cache, shards
        # pread on open descriptors, not mmap: a failing disk raises an error instead of killing the process.
        self._open: dict[int, OpenShard] = {}
        self.waiting: dict[int | str, float] = {}
        """Sample ids and index files that are being read => since when (time.monotonic)."""

    @property
    def is_remote(self) -> bool:
        """Whether the shards are not on this machine's file systems."""
        return self.storage.local_path("shards") is None

    def open(self, shard: int) -> OpenShard | None:
        """Open the shard on this machine; None if only the storage has it.

        Raises DataError if the file of a local data set is missing or has the wrong size.
        """
        opened = self._open.get(shard)
        if opened is None:
            file = self.shards[shard]
            path = self.storage.local_path(file.key)
            descriptor = self.cache.open(file) if path is None else _open_complete(file, str(path))
            if descriptor is None:
                return None
            for oldest in list(self._open)[: max(0, len(self._open) + 1 - OPEN_SHARDS)]:
                self._open.pop(oldest, None)
            opened = self._open[shard] = OpenShard(descriptor)
        return opened

    @contextmanager
    def waits_for(self, what: int | str) -> Iterator[None]:
        """Record in `waiting` what is being read."""
        self.waiting[what] = time.monotonic()
        try:
            yield
        finally:
            self.waiting.pop(what, None)

    def close_others(self, shards: Iterable[int]) -> None:
        """Close all other shards, so that the cache may evict them."""
        for shard in set(self._open) - set(shards):
            self._open.pop(shard, None)

    def read_views(
        self,
        samples: Iterable[SampleLocation],
        header: bytes,
        num_views: int,
        out_B2CHW: NDArray[np.float16],
    ) -> list[int]:
        """Read one view of each sample on this machine directly into its row of a contiguous array.

        Returns the rows that it could not read: the sample is not on this machine, is damaged, or has an npy
        header other than `header`. The content of these rows is undefined.
        """
        assert out_B2CHW.flags.c_contiguous
        rows_BN = out_B2CHW.reshape(len(out_B2CHW), -1).view(np.uint8)
        head, aside = np.empty(len(header), np.uint8), np.empty(rows_BN.shape[1], np.uint8)
        size = len(header) + num_views * aside.size
        header_crc32c = google_crc32c.value(header)
        waiting, unread = self.waiting, []
        for row, (sample_id, shard, offset, length, crc32c, view) in enumerate(samples):
            waiting[sample_id] = time.monotonic()
            # The checksum covers all views, so the others are read as well.
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
                    unread.append(row)
            except OSError:  # a failing disk
                unread.append(row)
            finally:
                waiting.pop(sample_id, None)
        return unread

    def read(self, shard: int, offset: int, length: int, crc32c: int, where: str) -> bytes:
        """Read the bytes of a sample; if they are wrong, read them from the storage a few times.

        A cached copy with wrong bytes is deleted. Raises DamagedError that starts with `where` if the
        checksum is wrong every time, StorageError.
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


def _open_complete(file: ShardFile, path: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"cannot open shard {file.name} at {path}: {error.strerror}") from None
    size = os.fstat(descriptor).st_size
    if size != file.size_bytes:
        os.close(descriptor)
        raise DataError(f"shard {file.name} at {path}: expected {file.size_bytes} bytes, got {size}")
    return descriptor


def concurrently(work: Callable[[T], object], items: Collection[T]) -> None:
    """Call `work` for every item, in up to READERS threads; raises the first error after all have finished.

    Uses daemon threads, not a pool: the process can exit while one of them waits for a storage.
    """
    pending, errors = deque(items), deque[Exception]()

    def run() -> None:
        with suppress(IndexError):
            while not errors:
                item = pending.popleft()
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
