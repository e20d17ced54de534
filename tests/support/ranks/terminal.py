"""Terminals that close, for tests: a pseudoterminal, and the process that it controls."""

import fcntl
import os
import subprocess
import termios
from collections.abc import Callable, Sequence


class Terminal:
    """A terminal with one program in the foreground."""

    def __init__(self, command: Sequence[str], before: Callable[[], object] = lambda: None) -> None:
        """`before` is called in the new process."""
        self._master, slave = os.openpty()

        def own() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            before()

        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=own
        )
        os.close(slave)
        os.set_blocking(self._master, False)

    def read(self) -> str:
        """Return the output since the last call. A full terminal blocks the program, so call this often."""
        try:
            return os.read(self._master, 2**20).decode(errors="replace")
        except BlockingIOError:
            return ""

    def type(self, key: str) -> None:
        os.write(self._master, key.encode())

    def close(self) -> None:
        """Close the terminal: the kernel sends SIGHUP, and writes fail from then on."""
        os.close(self._master)
