"""SIGTERM, SIGUSR1 and Ctrl-C ask for a stop: a flag, read at a step boundary on all ranks."""

import signal
from types import FrameType

REQUEUE_EXIT_CODE = 75
"""Leaves with this when it was asked to stop and has saved: start the same command again to go on."""


class StopRequest:
    """Up once a signal came; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.wanted = False
        # A supervisor starts the launcher with SIGTERM blocked, which is inherited; it is for ranks.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = True
