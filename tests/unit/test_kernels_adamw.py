"""Triton's AdamW with its moving average: torch's numbers, its memory traffic, what it takes on a GPU."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from tests.support.hopper import compile_for_hopper
from tests.support.interpreter import Call, interpreter
from tests.support.needs import needs

WEIGHTS = (1.0, 0.6, 0.3, 0.1, 1e-2, 1e-4)
"""Weights of an average, from a power function's first to 0.9999's."""
POINTERS = ("master", "grad", "exp_avg", "exp_avg_sq", "average", "updates", "skip")
NUMBERS = ("lr", "weight_decay", "rest1", "rest2", "log_beta1", "log_beta2", "eps", "weight")


@pytest.fixture(scope="module", autouse=True)
def triton() -> None:
    needs(find_spec("triton") is not None, "triton")


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    with interpreter() as call:
        yield call


def steps(*args: Any) -> Any:
    """Compare steps, in the interpreter's process."""
    from tests.support import adamw_steps

    return tuple(adamw_steps.compare(*args))


def launches(*args: Any) -> Any:
    """Count launches, in the interpreter's process."""
    from tests.support import adamw_steps

    return adamw_steps.launches(*args)


@pytest.mark.parametrize("num", [1, 1000, 2500])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("skipped", [0, 3])
def test_masters_moments_and_averages_equal_torchs(
    call: Call, num: int, weight_decay: float, skipped: int
) -> None:
    found, expected, updates = call(steps, num, weight_decay, WEIGHTS, skipped)
    print(f"largest differences: {np.abs(found - expected).max(axis=1)}")
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=3e-7)
    assert updates == (len(WEIGHTS) - 1, len(WEIGHTS) - 1)


def test_a_skipped_step_moves_only_the_average(call: Call) -> None:
    once, _, _ = call(steps, 500, 0.1, WEIGHTS[:1], -1)
    then, _, updates = call(steps, 500, 0.1, (WEIGHTS[0], 0.3), 1)
    assert updates[0] == 1
    np.testing.assert_array_equal(then[:3], once[:3])


def test_neighbours_in_memory_are_updated_in_one_launch(call: Call) -> None:
    assert call(launches, (300, 7, 1000), True) == ([1307], True)
    assert call(launches, (300, 7, 1000), False) == ([300, 7, 1000], True)


@pytest.mark.parametrize(("has_average", "read", "written"), [(True, 20, 16), (False, 16, 12)])
def test_the_kernel_fits_into_a_gpu_and_touches_each_number_once(
    has_average: bool, read: int, written: int
) -> None:
    """36 bytes per parameter with an average: five numbers read, four written, 16 bytes by instruction."""
    from dit_scale.kernels import adamw

    types = {f"{name}_ptr": "*fp32" for name in POINTERS} | {"num": "i32:16"} | dict.fromkeys(NUMBERS, "fp32")
    taken = compile_for_hopper(adamw.adamw_kernel, types, HAS_AVERAGE=has_average, SIZE=adamw.ELEMENTS)
    print(taken)
    assert taken.spilled_bytes == taken.stack_bytes == 0
    assert taken.registers <= 64
    threads = 4 * 32
    assert taken.wide_loads * 16 * threads == read * adamw.ELEMENTS
    assert taken.wide_stores * 16 * threads == written * adamw.ELEMENTS
