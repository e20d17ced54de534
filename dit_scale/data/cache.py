"""Shards of a remote data set on the node's own disk, shared by all processes of the node, within a budget.

    <folder>/<sha256>.tar    a complete shard: renamed to this only after its digest was verified
    <folder>/<sha256>.tmp    a download, at full size from the start to reserve its space

Names are digests, so data sets can share a folder, and files outlive the run. Kernel locks (flock) tell what
is in use and disappear with their process: an exclusive lock on a download, a shared lock on a shard that is
being read, and a short lock on the folder while a download is claimed. To make room, unused shards are
evicted, the least recently opened first.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import NamedTuple

from dit_scale.errors import DataError
from dit_scale.storage import Storage

PART_BYTES = 16 * 2**20
"""Bytes per request: the most that is fetched again when a connection breaks."""
RETRY_PAUSES_S = (0.0, 0.2, 0.4, 0.8)
"""Pauses before each read of something whose checksum may be wrong."""
_OURS = re.compile(r"[0-9a-f]{64}\.(tar|tmp)")


class ShardFile(NamedTuple):
    """The tar of a shard in its storage."""

    name: str
    key: str
    size_bytes: int
    sha256: str


class NoRoomError(DataError):
    """The cache cannot take a shard: its budget or the disk is full, or the folder is unusable."""


class ShardCache:
    """Verified copies of a storage's shards in a local folder of at most `limit_bytes` (0: no limit)."""

    def __init__(self, storage: Storage, folder: str | Path, limit_bytes: int = 0) -> None:
        self.storage, self.limit_bytes = storage, limit_bytes
        self.folder = Path(os.path.expanduser(folder))

    def holds(self, file: ShardFile) -> bool:
        """Whether the shard is in the cache."""
        return self._path(file).exists()

    def open(self, file: ShardFile) -> int | None:
        """Open the shard, which cannot be evicted until the descriptor is closed; None if it is not cached.

        A file of the wrong size is deleted. Other damage is up to the reader to detect and to `drop`.
        """
        try:
            descriptor = os.open(self._path(file), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        # Fails while the file is being evicted; afterwards the file has no name.
        if _locked(descriptor, fcntl.LOCK_SH) and os.fstat(descriptor).st_nlink:
            if os.fstat(descriptor).st_size == file.size_bytes:
                with suppress(PermissionError):  # another user's file
                    os.utime(descriptor)  # eviction goes by this time
                return descriptor
            self.drop(file, descriptor)
        os.close(descriptor)
        return None

    def drop(self, file: ShardFile, descriptor: int) -> None:
        """Delete the damaged file with this descriptor, unless another file has replaced it."""
        with suppress(PermissionError):
            _unlink(self._path(file), descriptor)

    def fetch(self, file: ShardFile, keep: Collection[ShardFile] = (), stop: Event | None = None) -> bool:
        """Download the shard. Returns False if another process is downloading it or `stop` is set.

        Raises NoRoomError if evicting shards other than `keep` does not make enough room, DataError if the
        storage repeatedly returns bytes with the wrong digest, StorageError.
        """
        stop = stop or Event()
        try:
            with ExitStack() as stack:
                part = self._claim(file, keep, stack)
                if part is None:
                    return self.holds(file)
                found = ""
                for pause_s in RETRY_PAUSES_S:
                    if not stop.wait(pause_s):
                        found = self._download(file, part, stop)
                    if stop.is_set():
                        return False
                    if found == file.sha256:
                        os.fsync(part)
                        os.replace(self._path(file, "tmp"), self._path(file))
                        return True
        except OSError as error:
            raise NoRoomError(
                f"cannot keep shard {file.name} in {self.folder}: {error.strerror}; set data.cache_dir"
            ) from None
        raise DataError(
            f"{self.storage.url}/{file.key}: expected SHA-256 {file.sha256} as in dataset.json, got {found}, "
            f"{len(RETRY_PAUSES_S)} times; the shard is not cached. Verify the data set"
        )

    def _path(self, file: ShardFile, suffix: str = "tar") -> Path:
        return self.folder / f"{file.sha256}.{suffix}"

    def _download(self, file: ShardFile, part: int, stop: Event) -> str:
        """Write the shard from its storage until `stop`. Returns the SHA-256 of what was written."""
        digest = hashlib.sha256()
        for start in range(0, file.size_bytes, PART_BYTES):
            if stop.is_set():
                break
            data = self.storage.read_range(file.key, start, min(PART_BYTES, file.size_bytes - start))
            digest.update(data)
            rest = memoryview(data)
            while rest:
                rest = rest[os.pwrite(part, rest, start + len(data) - len(rest)) :]
        return digest.hexdigest()

    def _claim(self, file: ShardFile, keep: Collection[ShardFile], stack: ExitStack) -> int | None:
        """Create a locked file of the shard's size; `stack` deletes it unless it is renamed.

        Returns None if the shard is cached by now, or another process is downloading it.
        """
        path = self._path(file, "tmp")
        if str(self.folder).startswith("~"):
            raise NoRoomError(f"no home directory is known for {self.folder}; set data.cache_dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        with _opened(self.folder, os.O_RDONLY | os.O_DIRECTORY) as folder:
            fcntl.flock(folder, fcntl.LOCK_EX)
            part = stack.enter_context(_opened(path, os.O_RDWR | os.O_CREAT))
            if not _locked(part, fcntl.LOCK_EX):
                return None
            stack.callback(_unlink, path, part)
            # Only now: a download that finishes after the file was opened turns it into the cached shard.
            if self.holds(file):
                return None
            os.ftruncate(part, 0)  # discard what a killed download wrote
            self._make_room(file, keep)
            os.posix_fallocate(part, 0, file.size_bytes)
            return part

    def _make_room(self, file: ShardFile, keep: Collection[ShardFile]) -> None:
        """Delete leftovers of killed downloads and evict as needed; the folder must be locked."""
        kept = {self._path(other).name for other in keep}
        used, idle = 0, []
        for name in filter(_OURS.fullmatch, os.listdir(self.folder)):
            path = self.folder / name
            with suppress(FileNotFoundError), ExitStack() as locks:  # dropped in the meantime
                found = path.stat()
                if name.endswith(".tmp") and _lock_idle(path, locks):
                    path.unlink()
                    continue
                used += found.st_size
                if name.endswith(".tar") and name not in kept:
                    idle.append((found.st_mtime_ns, found.st_size, path))
        if not self.limit_bytes:
            return
        with ExitStack() as locks:
            evicted = []
            for _, size_bytes, path in sorted(idle):
                if used + file.size_bytes > self.limit_bytes and _lock_idle(path, locks):
                    evicted.append(path)
                    used -= size_bytes
            if used + file.size_bytes > self.limit_bytes:
                raise NoRoomError(
                    f"{self.folder} has no room for shard {file.name} ({file.size_bytes} bytes) within "
                    f"data.cache_bytes={self.limit_bytes}; raise it, or set data.window_shards"
                )
            for path in evicted:
                path.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    """Lock a file without waiting. Returns whether it succeeded."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_idle(path: Path, locks: ExitStack) -> bool:
    """Lock a file that no process uses, until `locks` is closed. Returns whether it succeeded."""
    return _locked(locks.enter_context(_opened(path, os.O_RDONLY)), fcntl.LOCK_EX)


def _unlink(path: Path, descriptor: int) -> None:
    """Delete a path if it still leads to the file with this descriptor."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            path.unlink()
