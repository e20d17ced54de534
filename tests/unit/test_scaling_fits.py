"""Fits of a study: known power laws, scipy, and the paper's own correlation."""

import numpy as np
import pytest
from scipy import stats

from dit_scale.scaling import paper
from dit_scale.scaling.fits import correlation, power_law
from dit_scale.scaling.results import FID, fit, paper_results


def test_the_papers_correlation_is_that_of_log_gmacs_and_fid() -> None:
    runs = [one for one in paper_results() if one.conditioning == "adaln_zero"]
    gmacs, fid = [one.gmacs for one in runs], [one.metrics[FID] for one in runs]
    assert len(runs) == 12
    found = fit(paper_results(), FID, "adaln_zero").correlation
    assert found == correlation(gmacs, fid)
    assert round(found, 2) == paper.CORRELATION  # type: ignore[arg-type]
    # The other readings of "correlation between Gflops and FID" do not fit.
    assert round(np.corrcoef(gmacs, fid)[0, 1], 2) == -0.73
    assert round(np.corrcoef(np.log(gmacs), np.log(fid))[0, 1], 2) == -0.94


def test_parameters_alone_say_less() -> None:
    found = fit(paper_results(), FID, "adaln_zero").parameters_correlation
    assert found is not None
    assert round(found, 2) == -0.47


def test_an_exact_power_law_is_found() -> None:
    x = [1e12, 5e13, 2e15, 7e16]
    law = power_law(x, [3.0 * one**-0.125 for one in x])
    assert law is not None
    assert law.points == 4
    assert (law.scale, law.exponent) == pytest.approx((3.0, -0.125), rel=1e-9)
    assert law.exponent_standard_error == pytest.approx(0, abs=1e-12)
    assert law(1e14) == pytest.approx(3.0 * 1e14**-0.125, rel=1e-9)


def test_the_standard_error_is_that_of_scipy() -> None:
    draws = np.random.Generator(np.random.Philox(key=3))
    x = 10 ** draws.uniform(10, 20, 12)
    y = 50 * x**-0.3 * np.exp(0.2 * draws.normal(size=12))
    law, expected = power_law(list(x), list(y)), stats.linregress(np.log(x), np.log(y))
    assert law is not None
    assert law.exponent == pytest.approx(expected.slope, rel=1e-9)
    assert law.exponent_standard_error == pytest.approx(expected.stderr, rel=1e-9)
    assert correlation(list(x), list(y)) == pytest.approx(stats.pearsonr(np.log(x), y)[0], rel=1e-9)


def test_too_few_runs_have_no_fit() -> None:
    assert power_law([], []) is None
    assert power_law([2.0, 2.0], [1.0, 3.0]) is None
    assert power_law([1.0, 2.0, 3.0], [1.0, 0.0, 3.0]) is None
    two = power_law([1.0, 4.0], [1.0, 2.0])
    assert two is not None
    assert (two.exponent, two.exponent_standard_error) == (pytest.approx(0.5), None)
    assert correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert correlation([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) is None
