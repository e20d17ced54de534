"""KID: equal to the definition, unbiased, reproducible subsets."""

import math

import numpy as np
import pytest

from dit_scale.errors import DataError
from dit_scale.evaluate.kid import kid, kid_of_subsets


def draw(num: int, seed: int, shift: float = 0.0, num_features: int = 6) -> np.ndarray:
    x_NF = np.random.default_rng(seed).standard_normal((num, num_features)) + shift
    return x_NF.astype(np.float32)


def definition(x_NF: np.ndarray, y_MF: np.ndarray) -> float:
    """Sum the kernel over explicit pairs."""

    def mean(a, b, same: bool) -> float:
        values = [
            (math.fsum(float(p) * float(q) for p, q in zip(u, v, strict=True)) / len(u) + 1) ** 3
            for i, u in enumerate(a)
            for j, v in enumerate(b)
            if not (same and i == j)
        ]
        return math.fsum(values) / len(values)

    return mean(x_NF, x_NF, True) + mean(y_MF, y_MF, True) - 2 * mean(x_NF, y_MF, False)


@pytest.mark.parametrize("side", [0, 1, 4, 12])
def test_definition(side: int) -> None:
    x_NF, y_MF = draw(13, 1), draw(9, 2, shift=1.0)
    assert kid(x_NF, y_MF, side=side) == pytest.approx(definition(x_NF, y_MF), rel=1e-12)


def test_unbiased_for_one_distribution() -> None:
    values = [kid(draw(20, 2 * seed), draw(30, 2 * seed + 1)) for seed in range(400)]
    standard_error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * standard_error
    # Counting each image as its own pair, as the biased estimate does, would be found.
    biased = np.mean([((x**2).sum(axis=1) / 6 + 1).mean() ** 3 / 20 for x in (draw(20, s) for s in range(9))])
    assert biased > 10 * standard_error
    assert min(values) < 0 < max(values)


def test_the_expectation_is_that_of_the_kernel() -> None:
    """In one dimension x ~ N(0, 1) against y ~ N(m, 1), E k follows from E x^2 = 1 and E y^2 = 1 + m^2.

    k = 1 + 3 xy + 3 x^2 y^2 + x^3 y^3, so MMD^2 = 3 m^2 + 3 m^4 + (m^3 + 3 m)^2.
    """
    m = 0.5
    values = [kid(draw(40, s, 0.0, 1), draw(40, 1000 + s, m, 1)) for s in range(500)]
    expected = 3 * m**2 + 3 * m**4 + (m**3 + 3 * m) ** 2
    assert np.mean(values) == pytest.approx(expected, abs=3 * np.std(values) / math.sqrt(500))


def test_subsets_surround_the_estimate_from_all_pairs() -> None:
    x_NF, y_MF = draw(300, 1), draw(200, 2, shift=0.5)
    subsets = kid_of_subsets(x_NF, y_MF, num_subsets=60, num_images=50)
    assert (subsets.num_subsets, subsets.num_images) == (60, 50)
    assert subsets.mean == pytest.approx(kid(x_NF, y_MF), abs=4 * subsets.std / math.sqrt(60))
    assert subsets == kid_of_subsets(x_NF, y_MF, num_subsets=60, num_images=50)
    assert subsets != kid_of_subsets(x_NF, y_MF, num_subsets=60, num_images=50, seed=1)


def test_the_subsets_of_both_sets_are_independent() -> None:
    """Equal rows of a set and its copy would score about -0.7: each image meets itself."""
    x_NF = draw(300, 1)
    assert kid_of_subsets(x_NF, x_NF, num_subsets=20, num_images=20).mean > -0.3


def test_a_subset_of_everything_is_everything() -> None:
    """A subset draws without replacement, and the smaller set limits its size."""
    x_NF, y_MF = draw(30, 1), draw(30, 2)
    subsets = kid_of_subsets(x_NF, y_MF, num_subsets=3)
    assert subsets.num_images == 30
    assert subsets.mean == pytest.approx(kid(x_NF, y_MF), rel=1e-10)
    assert subsets.std < 1e-12


def test_different_networks_are_refused() -> None:
    with pytest.raises(DataError, match="between 6 and 5 features"):
        kid(draw(9, 1), draw(9, 1, num_features=5))


def test_one_image_is_refused() -> None:
    with pytest.raises(DataError, match="got 9 generated, 1 real"):
        kid(draw(9, 1), draw(1, 1))
