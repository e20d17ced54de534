"""Count, mean and scatter of features in float64: computed in parts, merged in any order.

    moments = Moments.of(first_tile) + Moments.of(second_tile)

Ranks send `arrays()`. The order of merges changes results only by the rounding of float64.

Shapes: N images, F features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dit_scale.errors import DataError

F64 = NDArray[np.float64]


def check_finite(features_NF: NDArray[Any]) -> None:
    """Raise DataError if a feature is infinite or not a number."""
    num_bad = np.count_nonzero(~np.isfinite(features_NF))
    if num_bad:
        raise DataError(
            f"{num_bad} of {features_NF.size} features are infinite or not a number; check the weights of "
            "the feature network, and do not run it in half precision"
        )


class HasGaussian(Protocol):
    """Anything with a mean and a covariance: `Moments` or `Gaussian`."""

    @property
    def mean_F(self) -> F64:
        """The mean."""
        ...

    @property
    def covariance_FF(self) -> F64:
        """The covariance."""
        ...


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A mean and a covariance whose images are gone, such as `mu` and `sigma` of a published reference."""

    mean_F: F64
    covariance_FF: F64


@dataclass(frozen=True, eq=False)
class Moments:
    """The sufficient statistics of a Gaussian fit, mergeable with `+`."""

    count: int
    mean_F: F64
    scatter_FF: F64
    """Sum of (x - mean)(x - mean)^T."""

    @classmethod
    def empty(cls, num_features: int) -> "Moments":
        """Return the moments of no image, the neutral element of `+`."""
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    @classmethod
    def of(cls, features_NF: NDArray[Any]) -> "Moments":
        """Compute the moments of a tile of features. Raises DataError if a feature is not finite."""
        x_NF = np.asarray(features_NF, dtype=np.float64)
        if not len(x_NF):
            return cls.empty(x_NF.shape[1])
        check_finite(x_NF)
        mean_F = x_NF.mean(axis=0)
        centered_NF = x_NF - mean_F
        return cls(len(x_NF), mean_F, centered_NF.T @ centered_NF)

    @classmethod
    def merge(cls, parts: Iterable["Moments"], num_features: int) -> "Moments":
        """Return the sum of all parts."""
        return sum(parts, start=cls.empty(num_features))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "Moments":
        """Read what `arrays` returns. Raises DataError if a shape or value is impossible."""
        count, mean_F, scatter_FF = (np.asarray(arrays[name]) for name in ("count", "mean", "scatter"))
        if count.shape != () or mean_F.ndim != 1 or scatter_FF.shape != 2 * mean_F.shape or count < 0:
            raise DataError(
                f"moments with count of shape {count.shape}, mean {mean_F.shape} and scatter "
                f"{scatter_FF.shape}; expected a count >= 0, (F,) and (F, F); compute them again"
            )
        return cls(int(count), mean_F.astype(np.float64), scatter_FF.astype(np.float64))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return plain arrays to store or to send to another rank."""
        return {"count": np.array(self.count), "mean": self.mean_F, "scatter": self.scatter_FF}

    @property
    def covariance_FF(self) -> F64:
        """The unbiased covariance (divisor count - 1), as np.cov and the ADM suite compute it."""
        if self.count < 2:
            raise DataError(f"a covariance needs 2 images or more, got {self.count}; sample more images")
        return self.scatter_FF / (self.count - 1)

    def __add__(self, other: "Moments") -> "Moments":
        """Merge two disjoint sets of images.

        Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance", 1983, Equation 2.1, for vectors.
        """
        if self.mean_F.shape != other.mean_F.shape:
            raise DataError(
                f"cannot merge moments of {len(self.mean_F)} and of {len(other.mean_F)} features; "
                "compute both with the same network"
            )
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        delta_F = other.mean_F - self.mean_F
        return Moments(
            count,
            self.mean_F + delta_F * (other.count / count),
            self.scatter_FF
            + other.scatter_FF
            + np.outer(delta_F, delta_F) * (self.count / count * other.count),
        )
