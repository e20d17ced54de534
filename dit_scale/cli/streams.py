"""Standard streams that may be closed, full, or connected to a terminal that no longer exists.

A job (training, a supervisor, encoding) continues without them, because its journal and metrics are files.
Any other command stops when its output cannot be written: silently with code 141 when the reader of a pipe
has exited, like a program that SIGPIPE ends, and with a message and code 2 otherwise, for example on a
full disk.
"""

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

CLOSED_PIPE_EXIT_CODE = 141
LOST_OUTPUT_EXIT_CODE = 2

_is_job = False


class LostOutputError(OSError):
    """Standard output cannot be written."""


class _Standard(io.FileIO):
    """A standard stream; a job drops what it cannot write."""

    def __init__(self, descriptor: int, is_needed: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._is_needed = is_needed

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:
                # another process has set O_NONBLOCK on the shared terminal or pipe
                select.select([], [self], [])
            return count
        except OSError as error:
            if not self._is_needed or _is_job:
                return len(data)
            with open(os.devnull, "wb") as nothing:  # absorbs what is still buffered
                os.dup2(nothing.fileno(), self.fileno())
            raise LostOutputError(error.errno, error.strerror) from None


def run_as_job() -> None:
    """From now on, ignore errors of the standard streams in this process."""
    global _is_job
    _is_job = True


def guarded(command: Callable[[], int]) -> int:
    """Run the command of this process with guarded standard streams and return its exit code."""
    _install()
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except LostOutputError as error:
        if error.errno == errno.EPIPE:
            return CLOSED_PIPE_EXIT_CODE
        print(f"dit-scale: cannot write the output: {error.strerror}; redirect it", file=sys.stderr)
        return LOST_OUTPUT_EXIT_CODE


def _install() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would take this descriptor
            os.open(os.devnull, os.O_RDWR)
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    sys.stdout = _text(sys.stdout, 1, is_needed=True)
    sys.stderr = _text(sys.stderr, 2, is_needed=False)


def _text(before: TextIO | None, descriptor: int, is_needed: bool) -> TextIO:
    """Return a stream like `before` (None if it was closed) that escapes characters it cannot encode."""
    raw = _Standard(descriptor, is_needed)
    is_error = descriptor == 2
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace",
        line_buffering=is_error or raw.isatty(),
        write_through=getattr(before, "write_through", False),
    )
