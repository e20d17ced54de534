"""The Frechet distance: closed forms, scipy's matrix square root, singular covariances, error and bias."""

import numpy as np
import pytest
import scipy.linalg

from dit_scale.errors import DataError
from dit_scale.evaluate.frechet import bias_note, expected_bias, frechet_distance, frechet_with_error
from dit_scale.evaluate.moments import Gaussian, Moments


def rotation(num_features: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((num_features, num_features)))[0]


def draw(num: int, scale_F: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, len(scale_F))) * scale_F


@pytest.mark.parametrize("turn_FF", [np.eye(6), rotation(6)], ids=["diagonal", "rotated"])
def test_closed_form_of_commuting_covariances(turn_FF: np.ndarray) -> None:
    """With a common eigenbasis the distance is |m1 - m2|^2 + sum (s1 - s2)^2."""
    s_F, other_s_F = np.array([3, 2, 1, 0.5, 1e-3, 4.0]), np.array([1, 2, 5, 0.1, 1e-2, 0.25])
    gap_F = np.arange(6.0)
    one = Gaussian(gap_F, turn_FF * s_F**2 @ turn_FF.T)
    other = Gaussian(np.zeros(6), turn_FF * other_s_F**2 @ turn_FF.T)
    expected = np.sum(gap_F**2) + np.sum((s_F - other_s_F) ** 2)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-12)


def test_scipys_matrix_square_root() -> None:
    one = Moments.of(draw(500, np.linspace(0.1, 3, 40), 1) @ rotation(40, 1) + 0.5)
    other = Moments.of(draw(300, np.linspace(2, 0.2, 40), 2) @ rotation(40, 2))
    root_FF = scipy.linalg.sqrtm(one.covariance_FF @ other.covariance_FF)
    trace = np.trace(one.covariance_FF + other.covariance_FF - 2 * root_FF.real)
    expected = np.sum((one.mean_F - other.mean_F) ** 2) + trace
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-11)


def test_singular_covariances() -> None:
    """Two planes in 50 dimensions that share one line: only the shared line contributes to the root."""
    turn_FF = rotation(50)
    s_F, other_s_F = np.zeros(50), np.zeros(50)
    s_F[[0, 1]], other_s_F[[1, 2]] = (2, 3), (5, 7)
    one = Gaussian(np.zeros(50), turn_FF * s_F**2 @ turn_FF.T)
    other = Gaussian(np.zeros(50), turn_FF * other_s_F**2 @ turn_FF.T)
    assert frechet_distance(one, other) == pytest.approx(2**2 + (3 - 5) ** 2 + 7**2, rel=1e-12)


@pytest.mark.parametrize("num", [30, 400], ids=["fewer images than features", "more images"])
def test_the_distance_to_itself_is_0(num: int) -> None:
    x_NF = draw(num, np.linspace(0.1, 30, 60), 1)
    shuffled_NF = np.random.default_rng(0).permutation(x_NF)
    again = Moments.merge([Moments.of(part) for part in np.array_split(shuffled_NF, 7)], 60)
    assert 0 <= frechet_distance(Moments.of(x_NF), Moments.of(x_NF)) < 1e-20
    assert 0 <= frechet_distance(Moments.of(x_NF), again) < 1e-20


@pytest.mark.parametrize("num", [30, 400], ids=["fewer images than features", "more images"])
def test_the_order_of_merges_does_not_matter(num: int) -> None:
    reference = Moments.of(draw(900, np.linspace(1, 20, 60), 2) + 1)
    x_NF = draw(num, np.linspace(0.1, 30, 60), 1)
    distances = []
    for seed in range(5):
        parts = np.array_split(np.random.default_rng(seed).permutation(x_NF), 3 + seed)
        distances.append(frechet_distance(Moments.merge([Moments.of(part) for part in parts], 60), reference))
    np.testing.assert_allclose(distances, distances[0], rtol=1e-11)


def test_the_standard_error_is_the_spread_of_repetitions() -> None:
    reference = Gaussian(np.zeros(4), np.diag([1.0, 2.0, 3.0, 4.0]))
    estimates = []
    for seed in range(150):
        x_NF = draw(200, np.array([2.0, 1.0, 1.5, 1.0]), seed) + 0.5
        estimates.append(frechet_with_error([Moments.of(b) for b in np.split(x_NF, 10)], reference))
    spread = np.std([estimate.value for estimate in estimates])
    assert np.mean([estimate.standard_error for estimate in estimates]) == pytest.approx(spread, rel=0.15)
    assert estimates[-1].value == pytest.approx(frechet_distance(Moments.of(x_NF), reference), rel=1e-12)


def test_a_standard_error_needs_blocks() -> None:
    with pytest.raises(DataError, match="2 blocks of images or more, got 1"):
        frechet_with_error([Moments.of(draw(9, np.ones(3), 0))], Gaussian(np.zeros(3), np.eye(3)))


@pytest.mark.parametrize("variance_F", [np.ones(32), np.exp(-np.arange(32) / 4.0)], ids=["flat", "steep"])
@pytest.mark.parametrize(("num", "tolerance"), [(8, 0.33), (32, 0.33), (64, 0.15), (320, 0.1)])
def test_the_expected_bias_is_that_of_perfect_samples(
    variance_F: np.ndarray, num: int, tolerance: float
) -> None:
    reference = Gaussian(np.zeros(32), np.diag(variance_F))
    drawn = [
        frechet_distance(Moments.of(draw(num, np.sqrt(variance_F), seed)), reference) for seed in range(60)
    ]
    assert expected_bias(reference, num) == pytest.approx(np.mean(drawn), rel=tolerance)


def test_too_few_images_are_noted_with_the_size_of_the_bias() -> None:
    reference = Gaussian(np.zeros(32), np.eye(32))
    note = bias_note(reference, 16)
    assert note is not None
    assert f"16 perfect images would score about {expected_bias(reference, 16):.4g}" in note
    assert bias_note(reference, 32) is not None
    assert bias_note(reference, 33) is None


def test_another_network_is_refused() -> None:
    with pytest.raises(DataError, match="between 3 and 4 features"):
        frechet_distance(Gaussian(np.zeros(3), np.eye(3)), Gaussian(np.zeros(4), np.eye(4)))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="infinite or not a number"):
        frechet_distance(Gaussian(np.zeros(3), np.eye(3) * np.nan), Gaussian(np.zeros(3), np.eye(3)))
