"""Attempts at a transfer that are given up when nothing moves any more, and objects in parts.

The timeout of a connection begins anew with every byte, and covers no name server and no handshake.
So an attempt runs in a thread of its own, and whoever waits for it looks at what has moved.
"""

import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from dit_scale.errors import StorageError

STALL_S = 20.0
"""Time after which an attempt without progress is given up."""
SLOWEST_BYTES_PER_S = 64 * 1024
"""A body that moves slower than this, averaged over STALL_S, makes no progress."""

_RECEIVE_BYTES = 64 * 1024

T = TypeVar("T")


class BrokenError(Exception):
    """A transfer that did not go as it should; another attempt may do better."""


class TransferProgress:
    """What one attempt has moved; ends it, when it moves more after it was given up, with BrokenError."""

    def __init__(self) -> None:
        self.bytes = 0
        self.given_up = False

    def moved(self, num_bytes: int) -> None:
        """So many bytes more."""
        if self.given_up:
            raise BrokenError("given up")
        self.bytes += num_bytes


def attempt(action: Callable[[TransferProgress], T]) -> T:
    """What `action` returns or raises. Raises BrokenError when it stalls; its thread may then live on."""
    watch = TransferProgress()
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(action(watch))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="transfer", daemon=True).start()
    try:
        before = 0
        while not wait([outcome], timeout=STALL_S).done:
            moved = watch.bytes - before
            if moved < STALL_S * SLOWEST_BYTES_PER_S:
                raise BrokenError(f"no answer in {STALL_S:g} s, in which {moved} bytes of a body moved")
            before += moved
    finally:
        watch.given_up = True
    return outcome.result()


class WatchedBody(io.RawIOBase):
    """A file over bytes in memory, which it does not copy, and whose reading is watched."""

    def __init__(self, data: bytes | bytearray, watch: TransferProgress) -> None:
        self._data = memoryview(data)
        self._watch = watch
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._data[self._at : self._at + len(buffer)]
        self._watch.moved(len(piece))
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def receive(read: Callable[[int], bytes], watch: TransferProgress) -> bytes:
    """The whole body behind `read`, which gives at most as many bytes as it is asked for."""
    received = io.BytesIO()
    while piece := read(_RECEIVE_BYTES):
        watch.moved(len(piece))
        received.write(piece)
    return received.getvalue()


def exactly(chunks: Iterable[memoryview], size: int, where: str) -> Iterator[memoryview]:
    """The pieces themselves. Raises StorageError when they are not `size` bytes in all."""
    got = 0
    for chunk in chunks:
        got += chunk.nbytes
        if got > size:
            raise StorageError(f"cannot write {where}: expected {size} bytes, the pieces hold more")
        yield chunk
    if got < size:
        raise StorageError(f"cannot write {where}: expected {size} bytes, the pieces hold {got}")


def parts(chunks: Iterable[memoryview], part_bytes: int) -> Iterator[bytearray]:
    """The pieces' bytes in parts of this size, the last one shorter."""
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
