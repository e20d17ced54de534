"""Rows of steps between log points: their order, their means, and the effect of skipped steps."""

from math import inf, nan

import pytest
import torch

from dit_scale.telemetry.meters import COLUMNS, Meters

GOOD = (1.0, 0.75, 0.25, 3.0, 0.0)
BETTER = (0.5, 0.25, 0.25, 1.0, 0.0)
FAILED = (nan, nan, nan, inf, 1.0)


def record(*rows: tuple[float, ...]) -> dict[str, float | None]:
    meters = Meters(global_batch=4)
    for row in rows:
        meters.add(torch.tensor(row))
    taken = meters.take()
    assert taken.pop("images_per_s") >= 0  # type: ignore[operator]
    return taken


def test_means_leave_skipped_steps_out() -> None:
    means = {"loss": 0.75, "mse": 0.5, "vb": 0.25, "grad_norm": 2.0}
    assert record(GOOD, FAILED, BETTER, FAILED) == {**means, "skipped": 2}


def test_without_a_good_step_there_is_no_mean() -> None:
    nothing = dict.fromkeys(COLUMNS[:-1])
    assert record(FAILED, FAILED) == {**nothing, "skipped": 2}
    assert record() == {**nothing, "skipped": 0}


def test_rows_come_in_the_order_of_the_steps_and_pending_ones_first() -> None:
    meters = Meters(global_batch=4, pending=(BETTER,))
    meters.add(torch.tensor(GOOD))
    assert meters.collect() == (BETTER, GOOD)
    meters.add(torch.tensor(BETTER))
    assert meters.collect() == (BETTER, GOOD, BETTER)
    assert meters.take()["loss"] == pytest.approx(2 / 3)
    assert meters.collect() == ()
