"""Claiming the number of an attempt; waits for free space when the disk is full."""

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
"""Seconds between two tries while the disk is full."""


def next_attempt(
    root: Storage, resumed_from: CheckpointId | None, excluded: Ranges, previous: AttemptRecord | None
) -> AttemptRecord:
    """The record of the next attempt of a run, or of the one right after `previous`.

    It excludes these positions in addition to those that the newest attempt excludes.
    """
    newest = attempts.newest(root)
    last_number = previous.number if previous else max(attempts.numbers(root), default=0)
    all_excluded = merge_ranges((*excluded, *(newest.excluded_positions if newest else ())))
    return AttemptRecord(last_number + 1, resumed_from, all_excluded)


def claim(
    root: Storage, attempt: AttemptRecord, deadline_s: float, beat: Callable[[], None], say: Say
) -> None:
    """Claim this attempt, waiting while the disk is full; calls `beat` before each try.

    Raises SupersededError when another process claimed the number first, and StorageError when the disk
    stays full for `deadline_s`.
    """
    give_up_s = time.monotonic() + deadline_s
    has_reported = False
    while True:
        beat()
        try:
            return attempts.claim(root, attempt)
        except DiskFullError as error:
            if time.monotonic() > give_up_s:
                raise StorageError(f"{error}; waited {deadline_s:g} s for free space") from error
            if not has_reported:
                say(f"ALARM: the run cannot start, waiting for free space: {error}")
            has_reported = True
        time.sleep(PAUSE_S)
