"""Append-only files of lines: a writer that survives a failing disk, and a reader of JSON lines.

A disk that is full or fails costs an alarm: lines are buffered in memory until they can be written. The
writer never truncates or replaces a file, because another process may append to it.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_BUFFERED_BYTES = 64 * 2**20
"""Size of the buffer for lines that cannot be written; further lines are dropped."""

Say = Callable[[str], None]
"""Shows one line of text to the user."""

Alarm = Say
"""Reports one failure that does not stop the run."""


class LineFile:
    """Appends lines. When `append` returns, the line is with the operating system, or buffered.

    Lines stay complete and in order: if the disk fills up in the middle of a line, the rest follows later.
    A file that was removed is created again with its earlier lines, as far as they can still be read. If a
    killed writer has left half a line, it gets a newline, and readers treat it as never written.
    """

    def __init__(self, path: Path, alarm: Alarm) -> None:
        """`alarm` is called once when lines cannot be written, and once when they can be written again."""
        self.path, self._alarm = path, alarm
        self._descriptor: int | None = None
        self._buffer: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._written_bytes = 0
        """Bytes of the first item of the buffer that are in the file already."""
        self._end_bytes = 0
        """Size of the file after the last write of this writer."""
        self._problem = ""
        self.dropped = 0
        """Lines that are neither in a file nor buffered."""

    @property
    def is_complete(self) -> bool:
        """Whether all lines are in the file."""
        return not self._problem

    def append(self, line: str) -> None:
        """Append a line, given without its newline."""
        self.append_lines(f"{line}\n".encode())

    def append_lines(self, data: bytes) -> None:
        """Append complete lines, each with its newline."""
        if self._buffered_bytes + len(data) > MAX_BUFFERED_BYTES and self._problem:
            self.dropped += data.count(b"\n")
            self.flush()
            return
        if data:
            self._buffer.append(data)
            self._buffered_bytes += len(data)
        self.flush()

    def flush(self) -> None:
        """Write the buffered lines, if possible."""
        previous = self._descriptor
        try:
            descriptor = self._open()
            while self._buffer:
                written = os.write(descriptor, memoryview(self._buffer[0])[self._written_bytes :])
                self._written_bytes += written
                self._end_bytes += written
                if self._written_bytes == len(self._buffer[0]):
                    self._buffered_bytes -= len(self._buffer.popleft())
                    self._written_bytes = 0
        except OSError as error:
            problem, before = error.strerror or str(error), self._problem
            self._problem = problem
            if not before:
                self._alarm(
                    f"{self.path} cannot be written: {problem}; its lines are buffered in memory until it can"
                )
            return
        if self._problem:
            self._problem = ""
            dropped = f", except {self.dropped} dropped when the buffer was full" if self.dropped else ""
            self._alarm(f"{self.path} can be written again; all buffered lines are written{dropped}")
        elif previous not in (None, self._descriptor):
            self._alarm(f"{self.path} was removed or replaced; writing continues in a new file of this name")

    def sync(self) -> None:
        """Flush the file to its device. Raises OSError."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> str:
        """Try once more, close the file, and return what could not be written; empty if nothing."""
        self.flush()
        missing = self.dropped + sum(data.count(b"\n") for data in self._buffer)
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None
        why = self._problem or "the buffer was full"
        return f"{self.path} is missing {missing} lines: {why}" if missing else ""

    def _open(self) -> int:
        """Open the file that has this path now, creating it if necessary, and make it end with a newline."""
        before = self._descriptor
        if before is None or not _is_named(before, self.path):
            earlier = self._earlier_lines()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o666)
            self._written_bytes = self._end_bytes = 0
            if earlier and not os.fstat(self._descriptor).st_size:
                self._buffer_first(earlier)
            if before is not None:
                with suppress(OSError):
                    os.close(before)
        assert self._descriptor is not None
        self._start_line(self._descriptor)
        return self._descriptor

    def _start_line(self, descriptor: int) -> None:
        """Add the newline if another writer has left a line without one."""
        size = os.fstat(descriptor).st_size
        if size == self._end_bytes:
            return
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            self._buffer_first(b"\n")
        self._written_bytes, self._end_bytes = 0, size

    def _buffer_first(self, data: bytes) -> None:
        self._buffer.appendleft(data)
        self._buffered_bytes += len(data)

    def _earlier_lines(self) -> bytes:
        """Return the contents of the open file, which has lost its path, without half a buffered line."""
        if self._descriptor is None:
            return b""
        with suppress(OSError):  # a network file system may have dropped the file
            size = os.fstat(self._descriptor).st_size - self._written_bytes
            return os.pread(self._descriptor, size, 0)
        return b""


def parse_object(line: str, *keys: str) -> dict[str, Any] | None:
    """Return the JSON object in a line; None if the line is torn or damaged, or lacks one of these keys."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and {*keys} <= value.keys() else None


def read_objects(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Return the JSON objects in a file, in order; none if there is no file.

    A kill can leave half a line at the end, and lines have no checksum: a line that does not parse, or lacks
    one of these keys, counts as never written.
    """
    return parse_objects(read_lines(path), *keys)


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, in order, in constant memory; none if there is no file."""
    if path.is_file():
        with path.open(errors="replace") as file:
            yield from file


def parse_objects(lines: Iterable[str], *keys: str) -> list[dict[str, Any]]:
    """Return the JSON objects in lines, in order, without lines that `parse_object` rejects."""
    return [value for line in lines if (value := parse_object(line, *keys)) is not None]


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this path."""
    try:
        opened = os.fstat(descriptor)
    except OSError:  # a stale handle: the file server does not know the file any more
        return False
    return path.exists() and os.path.samestat(opened, path.stat())
