"""The learning rate is a function of the step: warm-up, peak, decay, final value."""

import math
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dit_scale.config import OptimizerConfig
from dit_scale.train.optim import learning_rate

LR = st.floats(1e-8, 1.0)
WARMUP = st.integers(0, 50)
DECAY = st.sampled_from(["cosine", "linear"])
FINAL = st.floats(0.0, 1.0)
AFTER = st.integers(1, 300)
"""Steps after the warm-up."""


def rates(lr: float, warmup: int, num_steps: int, **decay: Any) -> list[float]:
    config = OptimizerConfig.model_validate({"lr": lr, "warmup_steps": warmup, **decay})
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


@given(LR, WARMUP, AFTER)
def test_without_a_decay_it_stays_at_the_peak(lr: float, warmup: int, after: int) -> None:
    rising = [lr * min(1.0, (step + 1) / max(1, warmup)) for step in range(warmup)]
    assert rates(lr, warmup, warmup + after) == [*rising, *[lr] * after]


@given(LR, WARMUP, AFTER, DECAY, FINAL)
def test_the_warm_up_is_the_same_and_the_last_step_has_the_final_value(
    lr: float, warmup: int, after: int, decay: str, final: float
) -> None:
    found = rates(lr, warmup, warmup + after, decay=decay, final_lr_fraction=final)
    at_peak = max(1, warmup)
    assert found[:at_peak] == rates(lr, warmup, warmup + after)[:at_peak]
    assert found[at_peak - 1] == lr
    if warmup + after > at_peak:
        assert found[-1] == lr * final


@given(LR, WARMUP, AFTER, DECAY, FINAL)
def test_after_the_warm_up_it_only_falls_and_by_no_more_than_the_steepest_slope(
    lr: float, warmup: int, after: int, decay: str, final: float
) -> None:
    """Also at the end of warm-up: the first step down is no larger than any other."""
    falling = rates(lr, warmup, warmup + after, decay=decay, final_lr_fraction=final)[max(1, warmup) - 1 :]
    slope = (math.pi / 2 if decay == "cosine" else 1.0) * lr * (1.0 - final) / max(1, len(falling) - 1)
    for before, after_it in pairwise(falling):
        assert -1e-15 * lr <= before - after_it <= slope * (1 + 1e-9) + 1e-15 * lr


@given(LR, WARMUP, st.integers(2, 100), FINAL)
def test_halfway_both_decays_are_halfway(lr: float, warmup: int, half: int, final: float) -> None:
    at_peak = max(1, warmup)
    for decay in ("cosine", "linear"):
        found = rates(lr, warmup, at_peak + 2 * half, decay=decay, final_lr_fraction=final)
        assert math.isclose(found[at_peak - 1 + half], lr * (1 + final) / 2, rel_tol=1e-12)


def test_a_known_schedule() -> None:
    found = rates(1.0, 2, 6, decay="cosine", final_lr_fraction=0.5)
    quarter = 0.25 * math.sqrt(0.5)
    assert [round(rate, 12) for rate in found] == [
        round(rate, 12) for rate in (0.5, 1.0, 0.75 + quarter, 0.75, 0.75 - quarter, 0.5)
    ]
