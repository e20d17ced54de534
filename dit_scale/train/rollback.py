"""When failed steps call for a rollback, and what the rollback excludes.

Pure functions of the step history: all ranks decide alike, and a resumed run decides as it would have without
the interruption. Steps are counted from 1, positions from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_scale.checkpoint.attempts import Ranges
from dit_scale.data.order import positions_of, ranges_of
from dit_scale.train.run_state import merge_ranges


@dataclass(frozen=True)
class Rollback:
    """A return to a checkpoint before a streak of failed steps."""

    first_failed_step: int
    last_failed_step: int
    excluded: Ranges
    """All positions to exclude from now on: those of the failed steps and those excluded before."""

    @property
    def at_most_step(self) -> int:
        """The last step before the streak: the checkpoint must not be newer."""
        return self.first_failed_step - 1

    @property
    def reason(self) -> str:
        """Describe the failed steps, for the log and for errors."""
        count = self.last_failed_step - self.at_most_step
        return f"{count} steps in a row failed, starting at step {self.first_failed_step}"


def failures_in_a_row(skipped_steps: Sequence[int], step: int) -> int:
    """How many consecutive steps were skipped, up to and including `step`."""
    count = 0
    while step - count in skipped_steps[-count - 1 :]:
        count += 1
    return count


def rollback_is_due(failures: int, step: int, rollback_after: int, log_every_steps: int) -> bool:
    """Whether `failures` skipped steps in a row, up to `step`, call for a rollback.

    Decided at log points only. Failures are also read before a save, but the steps at which a run saves
    depend on how long its saves take, and a rollback must not.
    """
    return step % log_every_steps == 0 and failures >= rollback_after


def plan_rollback(failures: int, step: int, global_batch: int, excluded: Ranges) -> Rollback:
    """The rollback for the last `failures` steps up to `step`."""
    positions = positions_of_steps(range(step - failures, step), global_batch, excluded)
    return Rollback(
        first_failed_step=step - failures + 1,
        last_failed_step=step,
        excluded=merge_ranges((*excluded, *ranges_of(positions))),
    )


def positions_of_steps(steps: range, global_batch: int, excluded: Ranges) -> NDArray[np.int64]:
    """The positions that consecutive steps (here counted from 0) train on."""
    indices = np.arange(steps.start * global_batch, steps.stop * global_batch, dtype=np.int64)
    return positions_of(indices, excluded)
