"""The signals that ask a process to save and leave: a flag, read where there is something to save.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGXCPU (a limit of CPU time) always count. SIGHUP (a closed terminal),
SIGQUIT (Ctrl-\\) and SIGUSR2 count unless they were ignored when the process started: `nohup` works, and so
does a supervisor, which has its ranks asked by SIGUSR1.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

REQUEUE_EXIT_CODE = 75
"""Leaves with this when it was asked to stop and has saved: start the same command again to go on."""

ALWAYS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGXCPU)
UNLESS_IGNORED = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
ALL = (*ALWAYS, *UNLESS_IGNORED)
KEYS = (signal.SIGINT, signal.SIGQUIT)
"""What a person types on a terminal: the second time it is meant."""


class StopRequest:
    """Up once a signal came; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.wanted = False
        # A supervisor starts the launcher with these blocked, which is inherited; they are for ranks.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ALWAYS)
        for number in caught():
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.wanted and number in KEYS:
            raise KeyboardInterrupt
        self.wanted = True


def caught() -> list[signal.Signals]:
    """The signals that count in this process."""
    return [*ALWAYS, *(number for number in UNLESS_IGNORED if signal.getsignal(number) != signal.SIG_IGN)]


def leave_until_ready(message: str) -> None:
    """Until other handlers are set, as by StopRequest, a signal ends the process with code 75.

    For the time of imports, in which there is nothing to save. The process ends on the spot: an exception
    could be caught by a module that is just being imported.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, message.encode() + b"\n")
        os._exit(REQUEUE_EXIT_CODE)

    for number in caught():
        signal.signal(number, leave)


def interrupt() -> None:
    """Have all of them interrupt this process as Ctrl-C does."""
    for number in caught():
        signal.signal(number, signal.default_int_handler)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Within the block, new processes get none of these signals: they stay blocked in them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
