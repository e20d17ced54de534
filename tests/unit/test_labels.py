"""Classes of images: in turn, or drawn by the image's number."""

import numpy as np
import pytest

from dit_scale.errors import ConfigError
from dit_scale.sampling.labels import LabelChoice, balanced_labels


def test_classes_are_used_in_turn() -> None:
    assert balanced_labels([3, 7], 5).tolist() == [3, 7, 3, 7, 3]
    assert balanced_labels(range(3), 2).tolist() == [0, 1]
    with pytest.raises(ConfigError, match="no classes"):
        balanced_labels([], 2)


def test_random_classes_depend_on_seed_and_number_only() -> None:
    choice = LabelChoice()
    labels_N = choice.labels(50_000, 1000, seed=3)
    assert labels_N.dtype == np.int64
    assert np.array_equal(choice.labels(100, 1000, seed=3), labels_N[:100])
    assert not np.array_equal(choice.labels(100, 1000, seed=4), labels_N[:100])
    counts = np.bincount(labels_N, minlength=1000)
    # 50 images per class on average with the spread of independent draws, unlike balanced labels
    assert 6 < counts.std() < 8
    assert counts.min() > 20


def test_random_among_some_classes() -> None:
    labels_N = LabelChoice(classes=(8, 2)).labels(100, 10, seed=0)
    assert set(labels_N.tolist()) == {2, 8}


@pytest.mark.parametrize("drawn", ["random", "balanced"])
@pytest.mark.parametrize("unknown", [-1, 5, 1000])
def test_an_unknown_class_is_refused(drawn: str, unknown: int) -> None:
    with pytest.raises(ConfigError, match=f"class {unknown}: expected 0 to 4"):
        LabelChoice(drawn=drawn, classes=(0, unknown)).labels(3, 5, seed=0)


def test_a_choice_in_words() -> None:
    assert str(LabelChoice()) == "drawn at random from all classes"
    assert str(LabelChoice(drawn="balanced", classes=(1, 2))) == "balanced over classes 1,2"
