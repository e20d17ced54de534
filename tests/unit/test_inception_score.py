"""The Inception Score: the definition, splits, order, merging."""

import numpy as np
import pytest

from dit_scale.errors import DataError
from dit_scale.evaluate.inception_score import SplitSums, inception_score


def definition(p_NC: np.ndarray, split_images: int) -> tuple[float, float]:
    """Score consecutive splits by the formula of the ADM suite."""
    scores = []
    for first in range(0, len(p_NC), split_images):
        part_NC = p_NC[first : first + split_images].astype(np.float64)
        divergence_N = (part_NC * (np.log(part_NC) - np.log(part_NC.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence_N.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def probabilities(num: int, num_classes: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(num_classes, 0.3), num).astype(np.float32)


@pytest.mark.parametrize("num", [40, 47], ids=["whole splits", "a short last split"])
@pytest.mark.parametrize("num_tiles", [1, 3, 8])
def test_consecutive_splits(num: int, num_tiles: int) -> None:
    p_NC = probabilities(num)
    score = inception_score(np.array_split(p_NC, num_tiles), num, seed=None, split_images=20)
    assert (score.mean, score.std) == pytest.approx(definition(p_NC, 20), rel=1e-12)
    assert score.num_splits == -(-num // 20)


def test_sure_and_balanced_is_the_number_of_classes() -> None:
    score = inception_score([np.tile(np.eye(10), (6, 1))], 60, seed=None, split_images=30)
    assert (score.mean, score.std) == pytest.approx((10, 0), abs=1e-12)


def test_images_that_are_all_alike_score_1() -> None:
    assert inception_score([np.full((9, 4), 0.25)], 9, seed=None).mean == pytest.approx(1)


def test_images_sorted_by_class_need_shuffled_splits() -> None:
    """With one class per split each split scores 1, although the images are sure and balanced."""
    sorted_NC = np.repeat(np.eye(10), 50, axis=0)
    assert inception_score([sorted_NC], 500, seed=None, split_images=50).mean == pytest.approx(1)
    shuffled = inception_score([sorted_NC], 500, seed=0, split_images=50)
    assert 8.5 < shuffled.mean <= 10
    one_split = inception_score([sorted_NC], 500, seed=0, split_images=500)
    assert one_split.mean == pytest.approx(10)


def test_a_shuffle_fills_all_splits_and_depends_on_the_seed_alone() -> None:
    p_NC = probabilities(47)
    whole = SplitSums.of(p_NC, 0, 47, seed=3, split_images=20)
    parts = [
        SplitSums.of(p_NC[a:b], a, 47, seed=3, split_images=20) for a, b in ((30, 47), (0, 11), (11, 30))
    ]
    merged = parts[0] + parts[1] + parts[2]
    assert whole.count_S.tolist() == merged.count_S.tolist() == [20, 20, 7]
    assert merged.score().mean == pytest.approx(whole.score().mean, rel=1e-13)
    assert SplitSums.of(p_NC, 0, 47, seed=4, split_images=20).score().mean != whole.score().mean


def test_a_class_without_probability_counts_nothing() -> None:
    p_NC = probabilities(40)
    padded_NC = np.concatenate((p_NC, np.zeros((40, 3), np.float32)), axis=1)
    padded = inception_score([padded_NC], 40, seed=None, split_images=20)
    assert padded.mean == pytest.approx(inception_score([p_NC], 40, seed=None, split_images=20).mean)


@pytest.mark.parametrize("p_NC", [np.array([[3.0, -2.0]]), np.array([[0.5, 0.4]])], ids=["logits", "no sum"])
def test_other_numbers_than_probabilities_are_refused(p_NC: np.ndarray) -> None:
    with pytest.raises(DataError, match="negative or do not sum to 1"):
        SplitSums.of(p_NC, 0, 1, seed=None)


def test_missing_images_are_refused() -> None:
    with pytest.raises(DataError, match="class probabilities of 9 images, expected 10"):
        inception_score([probabilities(9)], 10, seed=None)
