"""Transfers that are abandoned once they stall, and objects split into parts.

A socket timeout restarts with every byte, and covers neither the name server nor the TLS handshake. So each
try runs in a thread of its own, and the caller watches how many bytes it moves.
"""

import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from dit_scale.errors import StorageError

STALL_S = 20.0
"""Seconds without progress after which a try is abandoned."""
SLOWEST_BYTES_PER_S = 64 * 1024
"""Rate, averaged over STALL_S, below which a body counts as making no progress."""

_RECEIVE_BYTES = 64 * 1024

T = TypeVar("T")


class BrokenError(Exception):
    """A transfer failed in a way that a retry may fix."""


class TransferProgress:
    """The bytes that one try has moved. Once the try is abandoned, moving more raises BrokenError."""

    def __init__(self) -> None:
        self.bytes = 0
        self.abandoned = False

    def moved(self, num_bytes: int) -> None:
        """Count these bytes."""
        if self.abandoned:
            raise BrokenError("abandoned")
        self.bytes += num_bytes


def run_watched(action: Callable[[TransferProgress], T]) -> T:
    """Return or raise what `action` does; BrokenError if it stalls. Its thread may outlive the call."""
    progress = TransferProgress()
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(action(progress))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="transfer", daemon=True).start()
    try:
        before = 0
        while not wait([result], timeout=STALL_S).done:
            moved = progress.bytes - before
            if moved < STALL_S * SLOWEST_BYTES_PER_S:
                raise BrokenError(f"no answer in {STALL_S:g} s, in which {moved} bytes of a body moved")
            before += moved
    finally:
        progress.abandoned = True
    return result.result()


class WatchedBody(io.RawIOBase):
    """A file over bytes in memory, without a copy, that counts what is read from it."""

    def __init__(self, data: bytes | bytearray, progress: TransferProgress) -> None:
        self._data = memoryview(data)
        self._progress = progress
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._data)}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        chunk = self._data[self._position : self._position + len(buffer)]
        self._progress.moved(len(chunk))
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)


def body(data: bytes | bytearray, progress: TransferProgress) -> bytes | WatchedBody:
    """Return the body to send. A short one is not watched: even a slow one takes less than STALL_S."""
    is_short = len(data) <= STALL_S * SLOWEST_BYTES_PER_S
    return bytes(data) if is_short else WatchedBody(data, progress)


def receive(read: Callable[[int], bytes], progress: TransferProgress) -> bytes:
    """Read a body to its end; `read` returns at most as many bytes as it is asked for."""
    received = io.BytesIO()
    while chunk := read(_RECEIVE_BYTES):
        progress.moved(len(chunk))
        received.write(chunk)
    return received.getvalue()


def exactly(chunks: Iterable[memoryview], size: int, where: str) -> Iterator[memoryview]:
    """Pass the chunks through. Raises StorageError if they are not `size` bytes in total."""
    got = 0
    for chunk in chunks:
        got += chunk.nbytes
        if got > size:
            raise StorageError(f"cannot write {where}: expected {size} bytes, the chunks hold more")
        yield chunk
    if got < size:
        raise StorageError(f"cannot write {where}: expected {size} bytes, the chunks hold {got}")


def parts(chunks: Iterable[memoryview], part_bytes: int) -> Iterator[bytearray]:
    """Regroup the bytes of the chunks into parts of this size; the last part may be shorter."""
    part = bytearray()
    for chunk in chunks:
        rest = chunk.cast("B")
        while rest:
            room = part_bytes - len(part)
            part += rest[:room]
            rest = rest[room:]
            if len(part) == part_bytes:
                yield part
                part = bytearray()
    if part:
        yield part
