"""Moments: equal to numpy's, mergeable in any order, storable."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.errors import DataError
from dit_scale.evaluate.moments import Moments


def features(num: int, num_features: int, seed: int = 0) -> np.ndarray:
    """Return correlated features with a large offset."""
    rng = np.random.default_rng(seed)
    x_NF = rng.standard_normal((num, num_features)) @ rng.standard_normal((num_features, num_features))
    return (x_NF + 1000.0).astype(np.float32)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_parts_merged_in_any_order_equal_numpy(sizes: list[int], order) -> None:
    x_NF = features(sum(sizes) + 2, 5)
    parts = np.split(x_NF, np.cumsum(sizes))
    order.shuffle(parts)
    moments = Moments.merge([Moments.of(part) for part in parts], 5)
    assert moments.count == len(x_NF)
    np.testing.assert_allclose(moments.mean_F, x_NF.mean(axis=0, dtype=np.float64), rtol=1e-14)
    scale = np.abs(np.cov(x_NF.T.astype(np.float64))).max()
    np.testing.assert_allclose(
        moments.covariance_FF, np.cov(x_NF.T.astype(np.float64)), rtol=0, atol=1e-11 * scale
    )


def test_a_large_offset_costs_no_digits() -> None:
    """The one-pass formula sum(x x^T) - n m m^T would lose all of them."""
    x_NF = np.array([[1e9], [1e9 + 1], [1e9 + 2], [1e9 + 3]])
    moments = Moments.of(x_NF[:1]) + Moments.of(x_NF[1:])
    np.testing.assert_allclose(moments.covariance_FF, [[5 / 3]], rtol=1e-12)


def test_moments_of_nothing_are_neutral() -> None:
    some, none = Moments.of(features(7, 3)), Moments.of(np.zeros((0, 3)))
    for merged in (some + none, none + some, Moments.merge([none, some], 3)):
        assert merged.count == 7
        np.testing.assert_array_equal(merged.scatter_FF, some.scatter_FF)


def test_arrays_return_the_same_moments() -> None:
    moments = Moments.of(features(7, 3))
    again = Moments.from_arrays(moments.arrays())
    assert again.count == moments.count
    np.testing.assert_array_equal(again.mean_F, moments.mean_F)
    np.testing.assert_array_equal(again.scatter_FF, moments.scatter_FF)


@pytest.mark.parametrize(
    "change",
    [{"count": np.zeros(2)}, {"count": np.array(-1)}, {"mean": np.zeros(4)}, {"scatter": np.zeros(3)}],
)
def test_impossible_arrays_are_refused(change: dict[str, np.ndarray]) -> None:
    with pytest.raises(DataError, match=r"expected a count >= 0, \(F,\) and \(F, F\)"):
        Moments.from_arrays(Moments.of(features(7, 3)).arrays() | change)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    x_NF = features(7, 3)
    x_NF[2, 1] = value
    with pytest.raises(DataError, match="1 of 21 features are infinite or not a number"):
        Moments.of(x_NF)


def test_different_networks_do_not_merge() -> None:
    with pytest.raises(DataError, match="moments of 3 and of 4 features"):
        Moments.empty(3) + Moments.of(features(5, 4))


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(DataError, match="2 images or more, got 1"):
        _ = Moments.of(features(1, 3)).covariance_FF
