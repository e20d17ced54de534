"""Precision, recall, density, coverage: equal to brute force, ties included, whatever the tiles are."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_scale.errors import DataError
from dit_scale.evaluate import pairs
from dit_scale.evaluate.neighbours import Inclusions, inclusions, neighbour_scores, squared_radii


def distances(x_NF: np.ndarray, y_MF: np.ndarray) -> np.ndarray:
    return np.sqrt(((x_NF[:, None].astype(np.float64) - y_MF[None]) ** 2).sum(axis=2))


def radii(x_NF: np.ndarray, k: int) -> np.ndarray:
    """Sort all distances of each image; the first is its own."""
    return np.sort(distances(x_NF, x_NF), axis=1)[:, k]


def brute_force(real_MF: np.ndarray, generated_NF: np.ndarray) -> tuple[float, float, float, float]:
    d_MN = distances(real_MF, generated_NF)
    real3_M1, real5_M1 = radii(real_MF, 3)[:, None], radii(real_MF, 5)[:, None]
    return (
        float((d_MN <= real3_M1).any(axis=0).mean()),
        float((d_MN <= radii(generated_NF, 3)[None]).any(axis=1).mean()),
        float((d_MN < real5_M1).sum(axis=0).mean() / 5),
        float((d_MN.min(axis=1) < real5_M1[:, 0]).mean()),
    )


def as_tuple(scores) -> tuple[float, float, float, float]:
    return scores.precision, scores.recall, scores.density, scores.coverage


@st.composite
def two_sets(draw) -> tuple[np.ndarray, np.ndarray]:
    """Points of a small grid: many duplicates and equal distances. Small numbers have exact distances."""
    seed, num_features = draw(st.integers(0, 10**6)), draw(st.integers(1, 4))
    rng = np.random.default_rng(seed)
    high = draw(st.integers(2, 12))
    shapes = [(draw(st.integers(6, 25)), num_features) for _ in range(2)]
    real_MF, generated_NF = (rng.integers(0, high, shape).astype(np.float32) for shape in shapes)
    return real_MF + 512, generated_NF + 512


@settings(max_examples=50)
@given(two_sets())
def test_brute_force_with_ties(sets: tuple[np.ndarray, np.ndarray]) -> None:
    assert as_tuple(neighbour_scores(*sets)) == pytest.approx(brute_force(*sets), rel=1e-12)


@settings(max_examples=25)
@given(two_sets(), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_tiles_and_slices_change_no_bit(
    sets: tuple[np.ndarray, np.ndarray], side: int, num_slices: int, awkward: bool
) -> None:
    """Awkward numbers have distances that depend on the order of sums, unless it is fixed."""
    real_MF, generated_NF = (x * np.float32(0.1) + np.float32(awkward) / 3 for x in sets)
    real_M2, generated_N1 = squared_all(real_MF, (3, 5)), squared_all(generated_NF, (3,))
    np.testing.assert_array_equal(squared_all(real_MF, (3, 5), num_slices, side), real_M2)
    generated_N = generated_N1[:, 0]
    parts = [
        inclusions(
            real_MF, generated_NF, real_radii_M2=real_M2, generated_radii_N=generated_N, rows=rows, side=side
        )
        for rows in slices(len(generated_NF), num_slices)
    ]
    merged = sum(parts[1:], start=parts[0])
    assert merged.scores(len(generated_NF)) == neighbour_scores(real_MF, generated_NF)


def squared_all(x_NF: np.ndarray, counts: tuple[int, ...], num_slices: int = 1, side: int = 0) -> np.ndarray:
    parts = [squared_radii(x_NF, counts, rows, side=side) for rows in slices(len(x_NF), num_slices)]
    return np.concatenate(parts)


def slices(num: int, num_slices: int) -> list[range]:
    cuts = [num * i // num_slices for i in range(num_slices + 1)]
    return [range(first, last) for first, last in itertools.pairwise(cuts)]


def test_a_set_against_itself() -> None:
    """Ties with the radii are everywhere. Without its border, a ball of k neighbours holds k images."""
    x_NF = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32)
    scores = neighbour_scores(x_NF, x_NF)
    assert as_tuple(scores) == pytest.approx((1, 1, 1, 1))


def test_precision_is_about_generated_images_and_recall_about_real_ones() -> None:
    """One of two real clusters is generated: all that is generated is real, half of the real is generated."""
    rng = np.random.default_rng(0)
    cluster_NF = rng.standard_normal((40, 3)).astype(np.float32)
    real_MF = np.concatenate((cluster_NF, cluster_NF + 100))
    scores = neighbour_scores(real_MF, cluster_NF + np.float32(1e-3))
    assert (scores.precision, scores.recall, scores.coverage) == (1, 0.5, 0.5)
    assert scores.density == pytest.approx(1.1, abs=0.1)


def test_near_neighbours_of_large_features() -> None:
    """|x|^2 + |y|^2 - 2 x.y of these is wrong by more than the gaps between distances, which are exact."""
    rng = np.random.default_rng(0)
    real_MF, generated_NF = ((1e8 + 8 * rng.integers(0, 9, (num, 64))).astype(np.float32) for num in (60, 80))
    approximate_MM, _ = pairs.products(*[torch.from_numpy(real_MF.astype(np.float64))] * 2)
    gap_MM = np.abs(approximate_MM.numpy() - distances(real_MF, real_MF) ** 2)
    assert gap_MM.max() > 64
    np.testing.assert_allclose(squared_all(real_MF, (3,))[:, 0], radii(real_MF, 3) ** 2, rtol=1e-14)
    assert as_tuple(neighbour_scores(real_MF, generated_NF)) == brute_force(real_MF, generated_NF)


def test_exact_distances_depend_on_the_pair_alone() -> None:
    rng = np.random.default_rng(0)
    x_NF, y_MF = rng.standard_normal((9, 37)), rng.standard_normal((8, 37))
    x_P, y_P = (index.ravel() for index in np.indices((9, 8)))
    together = pairs.exact(x_NF, y_MF, x_P, y_P)
    alone = [
        pairs.exact(x_NF[x : x + 1], y_MF[y : y + 1], np.array([0]), np.array([0]))[0]
        for x, y in zip(x_P, y_P, strict=True)
    ]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, pairs.exact(y_MF, x_NF, y_P, x_P))


@pytest.mark.parametrize("num_features", [1, 64, 2048])
def test_the_error_bound_of_products_holds(num_features: int) -> None:
    rng = np.random.default_rng(0)
    x_NF = rng.standard_normal((40, num_features)) + 10
    y_MF = x_NF + rng.standard_normal((40, num_features)) * 1e-3
    squared_NM, error = pairs.products(torch.from_numpy(x_NF), torch.from_numpy(y_MF))
    x_P, y_P = (index.ravel() for index in np.indices((40, 40)))
    gap = np.abs(squared_NM.numpy().ravel() - pairs.exact(x_NF, y_MF, x_P, y_P)).max()
    assert 0 < gap <= error < 1e-6 * num_features


def test_a_block_fits_into_its_memory() -> None:
    for num_features in (1, 2048, 100_000, 10**9):
        side = pairs.side_of(num_features)
        assert 1 <= side <= pairs.MAX_SIDE
        assert side == 1 or 2 * side * num_features * 8 + 5 * side**2 * 8 <= pairs.BLOCK_BYTES


def test_merged_inclusions_count_each_real_image_once() -> None:
    some = Inclusions(1, 2, np.array([True, False]), np.array([True, True]))
    both = some + Inclusions(2, 3, np.array([True, False]), np.array([False, True]))
    assert as_tuple(both.scores(10)) == (0.3, 0.5, 0.1, 1.0)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="5 images have no 5-th nearest neighbours; use at least 6 images"):
        neighbour_scores(np.zeros((5, 3), np.float32), np.zeros((9, 3), np.float32))


def test_features_that_are_not_finite_are_refused() -> None:
    real_MF, generated_NF = np.zeros((9, 3), np.float32), np.zeros((9, 3), np.float32)
    generated_NF[4, 1] = np.nan
    with pytest.raises(DataError, match="1 of 27 features are infinite or not a number"):
        neighbour_scores(real_MF, generated_NF)
