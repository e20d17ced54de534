"""Shards of a remote data set on the node's own disk, fetched once for all processes of the node.

Files are named by their SHA-256, so data sets may share a folder and a file that is there is whole:
it gets its name only after its digest was checked.
"""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dit_scale.errors import DataError
from dit_scale.storage import Storage

PART_BYTES = 16 * 2**20
"""Bytes asked for at once: the most that is fetched again when a connection breaks."""


class ShardCache:
    """Local paths of a storage's objects: their own on disk, a verified copy for S3."""

    def __init__(self, storage: Storage, folder: str | Path) -> None:
        self.storage = storage
        self.folder = Path(folder).expanduser()

    def path(self, key: str, size_bytes: int, sha256: str) -> Path:
        """The local file of `key`; DataError when the storage holds other bytes than `sha256` names."""
        local = self.storage.local_path(key)
        if local is not None:
            return local
        path = self.folder / f"{sha256}{Path(key).suffix}"
        if not path.exists():
            with self._locked(sha256):
                if not path.exists():  # another process may have fetched it while this one waited
                    self._fetch(key, size_bytes, sha256, path)
        return path

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold this name among all processes of the node; the kernel frees it when a process dies."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / f"{name}.lock", "wb")  # noqa: SIM115
        except OSError as error:
            raise DataError(
                f"cannot use {self.folder} as cache: {error.strerror}; set data.cache_dir"
            ) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _fetch(self, key: str, size_bytes: int, sha256: str, path: Path) -> None:
        where = f"{self.storage.url}/{key}"
        found = self.storage.size(key)
        if found != size_bytes:
            raise DataError(f"{where}: expected {size_bytes} bytes as in dataset.json, got {found}")
        digest = hashlib.sha256()
        tmp = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            with open(tmp, "xb") as file:
                for start in range(0, size_bytes, PART_BYTES):
                    part = self.storage.read_range(key, start, min(PART_BYTES, size_bytes - start))
                    digest.update(part)
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != sha256:
                raise DataError(
                    f"{where}: expected SHA-256 {sha256} as in dataset.json, got {digest.hexdigest()}; "
                    "the shard is damaged: encode it again"
                )
            os.replace(tmp, path)
        except OSError as error:
            raise DataError(
                f"cannot cache {where} in {self.folder}: {error.strerror}; set data.cache_dir"
            ) from None
        finally:
            tmp.unlink(missing_ok=True)
