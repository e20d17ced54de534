"""The Inception Score: exp(E KL(p(y|x) || p(y))), per split of the images, from sums that merge.

    score = SplitSums.of(probabilities, first=0, num_images=50_000, seed=0).score()

Salimans et al., "Improved Techniques for Training GANs", 2016, Section 4. A split is 5,000 consecutive images
in the ADM suite. If samples are sorted by class, a split holds few classes and its score is far too low. With
a seed, a keyed permutation assigns images to splits; without one, they keep their given order.

Shapes: N images of a tile, C classes, S splits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_scale.data.order import permute
from dit_scale.errors import DataError
from dit_scale.evaluate.moments import F64, check_finite

SPLIT_IMAGES = 5000
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class InceptionScore:
    """The mean and the standard deviation of the score over splits."""

    mean: float
    std: float
    num_splits: int


@dataclass(frozen=True, eq=False)
class SplitSums:
    """Sums over the images of each split in float64, mergeable with `+`."""

    count_S: NDArray[np.signedinteger]
    plogp_S: F64
    """Sum of p ln p over images and classes: minus the entropies."""
    p_SC: F64
    """Sum of the probabilities of each class."""

    @classmethod
    def of(
        cls,
        probabilities_NC: NDArray[Any],
        first: int,
        num_images: int,
        seed: int | None,
        split_images: int = SPLIT_IMAGES,
    ) -> "SplitSums":
        """Sum over consecutive images, starting with image number `first` of `num_images`.

        Raises DataError if a row is no probability distribution.
        """
        p_NC = np.asarray(probabilities_NC, dtype=np.float64)
        check_finite(p_NC)
        if p_NC.min(initial=0.0) < 0 or np.abs(p_NC.sum(axis=1) - 1.0).max(initial=0.0) > 1e-3:
            raise DataError(
                "class probabilities are negative or do not sum to 1; pass softmax outputs in fp32"
            )
        index_N = np.arange(first, first + len(p_NC))
        if seed is not None:
            index_N = permute(index_N.astype(np.uint64), num_images, seed, 0).astype(np.int64)
        split_N = index_N // split_images
        num_splits = -(-num_images // split_images)
        # 0 ln 0 = 0
        plogp_N = np.sum(p_NC * np.log(np.where(p_NC > 0, p_NC, 1.0)), axis=1)
        p_SC = np.zeros((num_splits, p_NC.shape[1]))
        np.add.at(p_SC, split_N, p_NC)
        return cls(
            np.bincount(split_N, minlength=num_splits),
            np.bincount(split_N, weights=plogp_N, minlength=num_splits).astype(np.float64),
            p_SC,
        )

    def __add__(self, other: "SplitSums") -> "SplitSums":
        return SplitSums(self.count_S + other.count_S, self.plogp_S + other.plogp_S, self.p_SC + other.p_SC)

    def score(self) -> InceptionScore:
        """Return the score of the images so far. The last split may be shorter, as in the ADM suite."""
        used_S = self.count_S > 0
        count_S1 = self.count_S[used_S, None]
        marginal_SC = self.p_SC[used_S] / count_S1
        negentropy_S = np.sum(marginal_SC * np.log(np.where(marginal_SC > 0, marginal_SC, 1.0)), axis=1)
        # E KL(p(y|x) || p(y)) = H(p(y)) - E H(p(y|x))
        score_S = np.exp(self.plogp_S[used_S] / count_S1[:, 0] - negentropy_S)
        return InceptionScore(float(score_S.mean()), float(score_S.std()), int(used_S.sum()))


def inception_score(
    tiles: Iterable[NDArray[Any]], num_images: int, seed: int | None, split_images: int = SPLIT_IMAGES
) -> InceptionScore:
    """Return the score of all images, whose probabilities come in consecutive tiles."""
    sums: SplitSums | None = None
    first = 0
    for tile_NC in tiles:
        part = SplitSums.of(tile_NC, first, num_images, seed, split_images)
        sums = part if sums is None else sums + part
        first += len(tile_NC)
    if sums is None or first != num_images:
        raise DataError(f"class probabilities of {first} images, expected {num_images}")
    return sums.score()
