"""Claiming the number of an attempt, which waits for room when the disk is full."""

import time
from collections.abc import Callable

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.attempts import AttemptRecord, Ranges
from dit_scale.checkpoint.manifest import CheckpointId
from dit_scale.errors import StorageError
from dit_scale.lines import Say
from dit_scale.storage import DiskFullError, Storage
from dit_scale.train.run_state import merge_ranges

PAUSE_S = 5.0
"""Between two tries while there is no room."""


def next_attempt(
    root: Storage, resumed_from: CheckpointId | None, excluded: Ranges, behind: AttemptRecord | None
) -> AttemptRecord:
    """The next attempt of a run, or the one behind `behind`, which leaves these positions out, too."""
    before = attempts.newest(root)
    last = behind.number if behind else max(attempts.numbers(root), default=0)
    left_out = merge_ranges((*excluded, *(before.excluded_positions if before else ())))
    return AttemptRecord(last + 1, resumed_from, left_out)


def claim(
    root: Storage, attempt: AttemptRecord, deadline_s: float, beat: Callable[[], None], say: Say
) -> None:
    """Begin this attempt, as soon as there is room for its record.

    Raises SupersededError when another process was faster, also while this one waited; StorageError when
    there is no room for `deadline_s`.
    """
    give_up_s = time.monotonic() + deadline_s
    has_said = False
    while True:
        beat()
        try:
            return attempts.claim(root, attempt)
        except DiskFullError as error:
            if time.monotonic() > give_up_s:
                raise StorageError(f"{error}; waited for room for {deadline_s:g} s") from error
            if not has_said:
                say(f"ALARM: the run cannot begin, and waits for room: {error}")
            has_said = True
        time.sleep(PAUSE_S)
