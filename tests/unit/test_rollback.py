"""When failed steps call for a rollback, and which positions it excludes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.data.order import positions_of
from dit_scale.train.rollback import (
    Rollback,
    failures_in_a_row,
    plan_rollback,
    positions_of_steps,
    rollback_is_due,
)

BATCH = 7


@pytest.mark.parametrize(
    ("skipped_steps", "step", "failures"),
    [
        ((), 0, 0),
        ((), 8, 0),
        ((8,), 8, 1),
        ((7,), 8, 0),
        ((6, 7, 8), 8, 3),
        ((1, 2, 3), 3, 3),
        ((2, 5, 7, 8), 8, 2),
        ((2, 5, 6, 7), 8, 0),
    ],
)
def test_failures_in_a_row_end_at_this_step(skipped_steps: tuple[int, ...], step: int, failures: int) -> None:
    assert failures_in_a_row(skipped_steps, step) == failures


@given(st.sets(st.integers(1, 12)), st.integers(0, 12))
def test_failures_in_a_row_are_counted_backwards(skipped_steps: set[int], step: int) -> None:
    skipped = sorted(number for number in skipped_steps if number <= step)
    expected = next(count for count in range(step + 1) if step - count not in skipped)
    assert failures_in_a_row(skipped, step) == expected


@pytest.mark.parametrize(
    ("failures", "step", "due"), [(2, 8, False), (3, 8, True), (4, 8, True), (3, 7, False), (0, 4, False)]
)
def test_a_rollback_is_due_at_log_points_only(failures: int, step: int, due: bool) -> None:
    assert rollback_is_due(failures, step, rollback_after=3, log_every_steps=4) == due


def test_a_rollback_excludes_the_positions_of_the_failed_steps() -> None:
    rollback = plan_rollback(4, 8, BATCH, ())
    assert rollback == Rollback(5, 8, ((4 * BATCH, 8 * BATCH),))
    assert rollback.at_most_step == 4
    assert rollback.reason == "4 steps in a row failed, starting at step 5"


def test_a_second_rollback_keeps_what_the_first_one_excluded() -> None:
    first = plan_rollback(2, 4, BATCH, ())
    second = plan_rollback(1, 4, BATCH, first.excluded)
    assert first.excluded == ((14, 28),)
    # Step 4 now takes the positions that follow those excluded before.
    assert second.excluded == ((14, 28), (35, 42))


@given(st.integers(0, 5), st.integers(0, 5), st.sampled_from([(), ((0, 3),), ((5, 9), (20, 41))]))
def test_steps_take_consecutive_positions(
    first: int, count: int, excluded: tuple[tuple[int, int], ...]
) -> None:
    steps = range(first, first + count)
    by_step = [positions_of(np.arange(step * BATCH, (step + 1) * BATCH), excluded) for step in steps]
    together = positions_of_steps(steps, BATCH, excluded)
    assert together.tolist() == [position for positions in by_step for position in positions.tolist()]
