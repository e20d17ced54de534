"""The signals that ask a process to save and exit. They set a flag, which is read where a save is possible.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGXCPU (a CPU time limit) always count. SIGHUP (a closed terminal),
SIGQUIT (Ctrl-\\) and SIGUSR2 count unless they were ignored when the process started. So `nohup` works, and
so does a supervisor, which asks its ranks by SIGUSR1.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType

REQUEUE_EXIT_CODE = 75
"""Exit code of a process that was asked to stop and has saved: run the same command again to resume."""

ALWAYS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGXCPU)
UNLESS_IGNORED = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
ALL = (*ALWAYS, *UNLESS_IGNORED)
KEYS = (signal.SIGINT, signal.SIGQUIT)
"""Signals typed on a terminal. The second one interrupts immediately."""


class StopRequest:
    """Whether a signal has asked for a stop. A second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.wanted = False
        # A supervisor starts the launcher with these signals blocked, and children inherit that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ALWAYS)
        for number in caught():
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.wanted and number in KEYS:
            raise KeyboardInterrupt
        self.wanted = True


def caught() -> list[signal.Signals]:
    """Return the signals that count in this process."""
    return [*ALWAYS, *(number for number in UNLESS_IGNORED if signal.getsignal(number) != signal.SIG_IGN)]


def leave_until_ready(message: str) -> None:
    """Make signals end the process with code 75 until other handlers are set, as by StopRequest.

    This is for the time of imports, when there is nothing to save. The process exits without an exception,
    which a module that is being imported could catch.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, message.encode() + b"\n")
        os._exit(REQUEUE_EXIT_CODE)

    for number in caught():
        signal.signal(number, leave)


_interrupts: list[int] = []
"""Signals since `interrupt` that were handled or read from the pipe."""


def interrupt() -> None:
    """Make all of these signals interrupt the process like Ctrl-C, and be remembered by `was_interrupted`."""
    signal.set_wakeup_fd(_pipe()[1], warn_on_full_buffer=False)
    was_interrupted()
    _interrupts.clear()
    for number in caught():
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether a signal has arrived since `interrupt`.

    True even if foreign code has swallowed the KeyboardInterrupt, or blocks the main thread, so that no
    handler written in Python can run.
    """
    with suppress(BlockingIOError):
        _interrupts.extend(number for number in os.read(_pipe()[0], 4096) if number in ALL)
    return bool(_interrupts)


@cache
def _pipe() -> tuple[int, int]:
    """Return both ends of the pipe into which the interpreter writes each signal's number on arrival."""
    return os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Block these signals in processes that are started within the `with` block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
