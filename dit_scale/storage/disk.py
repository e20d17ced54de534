"""A folder on a local or shared file system."""

import errno
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dit_scale.errors import StorageError
from dit_scale.storage.base import DiskFullError, MissingKeyError, Storage, check_complete, check_key

_WINDOW_BYTES = 256 * 2**20
"""Size of the tail of a growing file that may stay in the page cache. Bounded: each fadvise call walks it."""

_MAX_VANISHED = 1000
"""How often the folder of a new file may vanish before its writer gives up."""


class DiskStorage(Storage):
    """A folder on a local or shared file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.url = str(self.folder)

    def read(self, key: str) -> bytes:
        with disk_errors(self, "read", key):
            return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with disk_errors(self, "read", key), open(self._path(key), "rb") as file:
            file.seek(start)
            data = file.read(length)
        check_complete(len(data), length, f"{self.url}/{key} at {start}")
        return data

    def write(self, key: str, data: bytes) -> None:
        self.write_stream(key, [memoryview(data)], len(data))

    def write_stream(self, key: str, chunks: Iterable[memoryview], size: int) -> None:
        path = self._path(key)
        with disk_errors(self, "write", key), self._temporary(path, chunks) as tmp:
            check_complete(tmp.stat().st_size, size, f"{self.url}/{key}")
            os.replace(tmp, path)
            self._sync_folders(path.parent)

    def write_new(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with disk_errors(self, "write", key), self._temporary(path, [memoryview(data)]) as tmp:
            try:
                os.link(tmp, path)
            except FileExistsError:
                # NFS may repeat a link() that has already succeeded: then our own file has two names.
                if tmp.stat().st_nlink != 2:
                    return False
            self._sync_folders(path.parent)
            return True

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def size(self, key: str) -> int:
        with disk_errors(self, "read", key):
            return self._path(key).stat().st_size

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        with disk_errors(self, "list", prefix):
            for key in self._walk(prefix):
                if not _is_temporary(key):
                    with suppress(FileNotFoundError):  # deleted in the meantime, or a dangling link
                        found.append((key, os.stat(self.folder / key).st_size))
        return sorted(found)

    def leftovers(self, prefix: str = "") -> Sequence[str]:
        with disk_errors(self, "list", prefix):
            return sorted(key for key in self._walk(prefix) if _is_temporary(key))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with disk_errors(self, "delete", key), suppress(FileNotFoundError):
            path.unlink()
            _sync_folder(path.parent)
            if path.parent != self.folder:
                with suppress(OSError):  # not empty
                    path.parent.rmdir()

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self.folder / check_key(key)

    def _walk(self, prefix: str) -> Iterator[str]:
        """Yield every key that starts with `prefix`, including temporary files."""
        top = self.folder / check_key(prefix.rpartition("/")[0]) if "/" in prefix else self.folder
        for folder, _, names in os.walk(top, onerror=_raise_unless_missing, followlinks=True):
            keys = (os.path.relpath(os.path.join(folder, name), self.folder) for name in names)
            yield from (key for key in keys if key.startswith(prefix))

    def _sync_folders(self, folder: Path) -> None:
        """Make the entries of a folder and of its parents durable: their creator may have been killed."""
        while folder != self.folder:
            _sync_folder(folder)
            folder = folder.parent
        _sync_folder(folder)

    @contextmanager
    def _temporary(self, path: Path, chunks: Iterable[memoryview]) -> Iterator[Path]:
        """Write a synced temporary file next to `path`; it is deleted afterwards unless renamed."""
        tmp = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
        try:
            descriptor = _create(tmp)
            try:
                size = 0
                for chunk in chunks:
                    _write_all(descriptor, chunk)
                    size += len(chunk)
                    # Start writeback now, not at the sync, and free the pages that are on the device.
                    os.posix_fadvise(descriptor, max(0, size - _WINDOW_BYTES), 0, os.POSIX_FADV_DONTNEED)
                os.fsync(descriptor)
                # A read-back then comes from the device, and the file takes no memory from others.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
            yield tmp
        finally:
            tmp.unlink(missing_ok=True)


def _create(path: Path) -> int:
    """Create a file and its folder, which another process may delete whenever it is empty => descriptor."""
    for _ in range(_MAX_VANISHED):
        with suppress(FileNotFoundError):
            return _create_once(path)
    return _create_once(path)


def _create_once(path: Path) -> int:
    _make_folder(path.parent)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _raise_unless_missing(error: OSError) -> None:
    """Treat a missing folder as empty: another process may delete it at any time."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _is_temporary(key: str) -> bool:
    name = key.rpartition("/")[2]
    return name.startswith(".") and name.endswith(".tmp")


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        with suppress(FileExistsError):  # pathlib's exist_ok would fail if the folder then vanished
            folder.mkdir()
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(storage: Storage, verb: str, key: str) -> Iterator[None]:
    """Turn OSError into StorageError that says what failed and what to do."""
    where = f"{storage.url}/{key}"
    try:
        yield
    except FileNotFoundError:
        raise MissingKeyError(f"cannot {verb} {where}: not found") from None
    except OSError as error:
        advice = {
            errno.ENOSPC: "; free some space, data already written is intact",
            errno.EDQUOT: "; raise the quota or free some space, data already written is intact",
            errno.EACCES: "; check the owner and mode of the folder",
            errno.EROFS: "; choose a writable folder",
            errno.EPERM: "; if this file system does not support hard links, choose another or s3://",
            errno.ENOTSUP: "; if this file system does not support hard links, choose another or s3://",
        }.get(error.errno or 0, "")
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = DiskFullError if is_full else StorageError
        raise kind(f"cannot {verb} {where}: {error.strerror}{advice}") from error
