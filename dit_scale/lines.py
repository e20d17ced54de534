"""Files of lines that only grow: a writer that does not depend on the disk, and the reader of JSON lines.

A disk that is full, or fails, costs an alarm: lines are kept in memory until they can be written. Nothing is
ever cut off or replaced, for another process may append to the same file.
"""

import json
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

KEPT_BYTES = 64 * 2**20
"""Of lines that cannot be written; those that come when there are so many are lost."""

Say = Callable[[str], None]
"""Shows one line of text to the user."""

Alarm = Say
"""Reports one failure that does not stop the run."""


class LineFile:
    """Appends lines; each is with the operating system, or kept, when `append` returns.

    Lines stay whole and in order: what was written of one, when the disk became full, is completed later.
    A file that was removed is made again, with all that it held as far as it can still be read. A last line
    without an end, which a killed writer left, gets its end, and counts as never written.
    """

    def __init__(self, path: Path, alarm: Alarm) -> None:
        """`alarm` hears once when lines cannot be written, and when they could be after all."""
        self.path, self._alarm = path, alarm
        self._descriptor: int | None = None
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._written_bytes = 0
        """Of the first line that is kept."""
        self._end_bytes = 0
        """Size of the file as this writer left it."""
        self._problem = ""
        self.lost = 0
        """Lines that are in no file and not kept either."""

    @property
    def is_whole(self) -> bool:
        """Whether all lines are in the file."""
        return not self._problem

    def append(self, line: str) -> None:
        """Add a line, given without its end."""
        self.append_lines(f"{line}\n".encode())

    def append_lines(self, data: bytes) -> None:
        """Add whole lines, each with its end."""
        if self._kept_bytes + len(data) > KEPT_BYTES and self._problem:
            self.lost += data.count(b"\n")
            self.flush()
            return
        if data:
            self._kept.append(data)
            self._kept_bytes += len(data)
        self.flush()

    def flush(self) -> None:
        """Write what is kept, if that is possible now."""
        had_file = self._descriptor
        try:
            descriptor = self._open()
            while self._kept:
                written = os.write(descriptor, memoryview(self._kept[0])[self._written_bytes :])
                self._written_bytes += written
                self._end_bytes += written
                if self._written_bytes == len(self._kept[0]):
                    self._kept_bytes -= len(self._kept.popleft())
                    self._written_bytes = 0
        except OSError as error:
            problem, before = error.strerror or str(error), self._problem
            self._problem = problem
            if not before:
                self._alarm(
                    f"{self.path} cannot be written: {problem}; its lines are kept in memory until it can be"
                )
            return
        if self._problem:
            self._problem = ""
            lost = f", but for {self.lost} lines that memory had no room for" if self.lost else ""
            self._alarm(f"{self.path} can be written again, and has the lines that were kept{lost}")
        elif had_file not in (None, self._descriptor):
            self._alarm(f"{self.path} was removed or replaced, and is written anew")

    def sync(self) -> None:
        """Wait until the device has what was written. Raises OSError."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> str:
        """Try once more. Returns, in words, what could not be written; empty when all was."""
        self.flush()
        lost = self.lost + sum(data.count(b"\n") for data in self._kept)
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None
        why = self._problem or "memory had no room for them"
        return f"{self.path} lacks {lost} lines: {why}" if lost else ""

    def _open(self) -> int:
        """The descriptor of the file that the path names now, made anew when there is none, at a new line."""
        before = self._descriptor
        if before is None or not _is_named(before, self.path):
            held = self._held()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o666)
            self._written_bytes = self._end_bytes = 0
            if held and not os.fstat(self._descriptor).st_size:
                self._keep_first(held)
            if before is not None:
                with suppress(OSError):
                    os.close(before)
        assert self._descriptor is not None
        self._begin_line(self._descriptor)
        return self._descriptor

    def _begin_line(self, descriptor: int) -> None:
        """Where another writer has left a line without its end, give it one."""
        size = os.fstat(descriptor).st_size
        if size == self._end_bytes:
            return
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            self._keep_first(b"\n")
        self._written_bytes, self._end_bytes = 0, size

    def _keep_first(self, data: bytes) -> None:
        self._kept.appendleft(data)
        self._kept_bytes += len(data)

    def _held(self) -> bytes:
        """What is in the file that lost its name, without what was written of a line that is kept."""
        if self._descriptor is None:
            return b""
        with suppress(OSError):  # a server may have forgotten it
            size = os.fstat(self._descriptor).st_size - self._written_bytes
            return os.pread(self._descriptor, size, 0)
        return b""


def parsed(line: str, *keys: str) -> dict[str, Any] | None:
    """The JSON object in a line; None for a torn or damaged line, or for one without these keys."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {*keys} <= found.keys() else None


def read_objects(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The JSON objects in a file, in order; none when there is no file.

    A kill can leave half a line at the end, and lines have no checksum: a line that does not parse, or lacks
    one of these keys, counts as never written.
    """
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [found for line in lines if (found := parsed(line, *keys)) is not None]


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        opened = os.fstat(descriptor)
    except OSError:  # a stale handle: the server knows it no more
        return False
    return path.exists() and os.path.samestat(opened, path.stat())
