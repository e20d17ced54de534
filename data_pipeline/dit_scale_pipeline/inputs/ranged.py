"""A byte range of a stored object as a seekable file: each read is one ranged read."""

import io
import os
from typing import TYPE_CHECKING

from dit_scale.storage import Storage

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class RangedFile(io.RawIOBase):
    """Bytes `start` to `end` of an object, unbuffered; see `buffered`."""

    def __init__(self, storage: Storage, key: str, start: int, end: int) -> None:
        super().__init__()
        self.name = f"{storage.url}/{key}"
        self._storage, self._key = storage, key
        self._start, self._length = start, end - start
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        count = max(0, min(len(target), self._length - self._position))
        if count:
            data = self._storage.read_range(self._key, self._start + self._position, count)
            target[:count] = data
            self._position += count
        return count


def buffered(storage: Storage, key: str, start: int, end: int, window_bytes: int) -> io.BufferedReader:
    """Open a byte range that is read one window at a time; seeking within the window reads nothing."""
    return io.BufferedReader(RangedFile(storage, key, start, end), window_bytes)
