"""All scores on real images: two halves of scikit-learn's digits score well, spoiled digits score badly.

The features are the 64 pixels, the class probabilities a softmax over distances to the class means.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from dit_scale.evaluate.frechet import expected_bias, frechet_with_error
from dit_scale.evaluate.inception_score import inception_score
from dit_scale.evaluate.kid import kid
from dit_scale.evaluate.moments import Moments
from dit_scale.evaluate.neighbours import NeighbourScores, neighbour_scores


@dataclass(frozen=True)
class Scores:
    frechet: float
    frechet_error: float
    inception_score: float
    kid: float
    neighbours: NeighbourScores


@pytest.fixture(scope="module")
def halves() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two random halves of the digits => (898, 64), (899, 64), and the class means (10, 64), in 0..1."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels_N64 = (bunch.data / 16).astype(np.float32)
    means_C64 = np.stack([pixels_N64[bunch.target == label].mean(axis=0) for label in range(10)])
    order = np.random.default_rng(0).permutation(len(pixels_N64))
    return pixels_N64[order[:898]], pixels_N64[order[898:]], means_C64


def score(real_M64: np.ndarray, generated_N64: np.ndarray, means_C64: np.ndarray) -> Scores:
    logits_NC = -4 * ((generated_N64[:, None] - means_C64) ** 2).sum(axis=2)
    p_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    p_NC /= p_NC.sum(axis=1, keepdims=True)
    frechet = frechet_with_error(
        [Moments.of(part) for part in np.array_split(generated_N64, 10)], Moments.of(real_M64)
    )
    scores = Scores(
        frechet.value,
        frechet.standard_error,
        inception_score([p_NC], len(p_NC), seed=0).mean,
        kid(generated_N64, real_M64),
        neighbour_scores(real_M64, generated_N64),
    )
    print(scores)
    return scores


def test_two_halves_of_the_digits_are_alike(halves: tuple[np.ndarray, ...]) -> None:
    real_M64, generated_N64, means_C64 = halves
    scores = score(real_M64, generated_N64, means_C64)
    # Both halves are samples, so the bias counts twice.
    bias = 2 * expected_bias(Moments.of(real_M64), len(generated_N64))
    assert scores.frechet == pytest.approx(bias, rel=0.25)
    assert abs(scores.kid) < 1e-3
    assert 8 < scores.inception_score < 10
    near = scores.neighbours
    assert 0.8 < near.precision < 0.95
    assert 0.8 < near.recall < 0.95
    assert 0.9 < near.density < 1.1
    assert 0.93 < near.coverage < 1


def test_noise_lowers_precision_and_a_missing_class_lowers_recall(halves: tuple[np.ndarray, ...]) -> None:
    real_M64, generated_N64, means_C64 = halves
    same = score(real_M64, generated_N64, means_C64)
    noise_N64 = np.random.default_rng(0).standard_normal(generated_N64.shape).astype(np.float32)
    noisy = score(real_M64, generated_N64 + np.float32(0.15) * noise_N64, means_C64)
    label_N = ((generated_N64[:, None] - means_C64) ** 2).sum(axis=2).argmin(axis=1)
    fewer = score(real_M64, generated_N64[label_N < 5], means_C64)
    for worse in (noisy, fewer):
        error = np.hypot(worse.frechet_error, same.frechet_error)
        assert worse.frechet - same.frechet > 5 * error
        assert worse.inception_score < same.inception_score
    assert fewer.kid > same.kid + 5e-3
    assert noisy.neighbours.precision < 0.5 * same.neighbours.precision
    assert fewer.neighbours.precision > 0.8 * same.neighbours.precision
    assert fewer.neighbours.recall < 0.75 * same.neighbours.recall
    assert fewer.neighbours.coverage < 0.75 * same.neighbours.coverage
