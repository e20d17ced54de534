"""The cases of the benchmark of samplers are possible, and its comparison marks what it says."""

import pytest

from benchmarks import solvers
from dit_scale.sampling.denoise import sampling_schedule


@pytest.mark.parametrize("case", solvers.CASES)
def test_every_case_is_possible(case: str) -> None:
    settings = solvers.settings_of(case, 1.5, 200)
    assert len(sampling_schedule(1000, settings, "cpu")) == int(case.split(":")[1])


def row(case: str, frechet: float, recognised: float) -> solvers.Row:
    method, steps, spacing = case.split(":")
    return {
        "method": method,
        "steps": int(steps),
        "spacing": spacing,
        "frechet": frechet,
        "frechet_error": 3.0,
        "recognised": recognised,
        "recognised_error": 0.004,
    }


def test_a_figure_is_equal_within_one_standard_error_of_the_difference() -> None:
    rows = [
        row("dpmpp_2m:20:logsnr", 54.2, 0.985),  # sqrt(3^2 + 3^2) = 4.24
        row("ddim:20:uniform", 54.3, 0.974),  # sqrt(2) * 0.004 = 0.0057
        row(solvers.STANDARD, 50.0, 0.980),
        row("unipc:20:logsnr", 40.0, 0.975),
    ]
    solvers.compare(rows)
    assert [each["frechet_equal"] for each in rows] == [True, False, True, True]
    assert [each["recognised_equal"] for each in rows] == [True, False, True, True]


def test_nothing_is_compared_without_the_standard() -> None:
    rows = [row("ddim:20:uniform", 54.3, 0.974)]
    solvers.compare(rows)
    assert "frechet_equal" not in rows[0]
