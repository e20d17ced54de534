"""Rows of steps between log points: their order, their means, and the effect of skipped steps."""

from math import inf, nan

import pytest
import torch

from dit_scale.telemetry.meters import COLUMNS, QUARTERS, SAMPLE_COLUMNS, Meters

GOOD = (1.0, 0.75, 0.25, 3.0, 0.0, 4.0, 6.0, 0.0, 1.0, 1.0, 2.0, 0.0, 1.0, 1.0)
BETTER = (0.5, 0.25, 0.25, 1.0, 0.0, 2.0, 2.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 2.0)
FAILED = (nan, nan, nan, inf, 1.0, nan, nan, nan, nan, nan, 1.0, 1.0, 1.0, 1.0)


def record(*rows: tuple[float, ...]) -> dict[str, float | None]:
    meters = Meters()
    for row in rows:
        meters.add(torch.tensor(row))
    return meters.take()


def test_nothing_includes_skipped_steps() -> None:
    means = {"loss": 0.75, "mse": 0.5, "vb": 0.25, "grad_norm": 2.0}
    # Each quarter is a mean over its samples, not over the means of the steps.
    samples = {"loss_max": 4.0, "loss_q0": 2.0, "loss_q1": None, "loss_q2": 1.0, "loss_q3": 2 / 3}
    assert record(GOOD, FAILED, BETTER, FAILED) == {**means, "skipped": 2, **samples}


def test_without_a_good_step_there_is_no_mean() -> None:
    keys = [name for name in COLUMNS if name != "skipped"]
    nothing = dict.fromkeys([*keys, "loss_max", *(f"loss_q{quarter}" for quarter in range(QUARTERS))])
    assert record(FAILED, FAILED) == {**nothing, "skipped": 2}
    assert record() == {**nothing, "skipped": 0}


def test_rows_come_in_the_order_of_the_steps_and_pending_ones_first() -> None:
    meters = Meters(pending=(BETTER,))
    meters.add(torch.tensor(GOOD))
    assert meters.collect() == (BETTER, GOOD)
    meters.add(torch.tensor(BETTER))
    assert meters.collect() == (BETTER, GOOD, BETTER)
    assert meters.take()["loss"] == pytest.approx(2 / 3)
    assert meters.collect() == ()


def test_rows_of_an_earlier_version_count_in_the_means_but_have_no_samples() -> None:
    old = GOOD[: len(COLUMNS)]
    alone = Meters(pending=(old,)).take()
    assert (alone["loss"], alone["loss_max"], alone["loss_q0"]) == (1.0, None, None)
    meters = Meters(pending=(old,))
    meters.add(torch.tensor(BETTER))
    assert meters.collect()[0] == (*old, *[0.0] * len(SAMPLE_COLUMNS))
    taken = meters.take()
    assert (taken["loss"], taken["loss_max"], taken["loss_q0"]) == (0.75, 2.0, 1.0)
