"""Mean and standard deviation per latent channel of a data set, computed from sums over its samples.

Shapes: V views, C latent channels, h w latent sides.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def channel_sums(moments: npt.NDArray[np.float16]) -> npt.NDArray[np.float64]:
    """Return (2, C): the sums of mean and of mean^2 + std^2 over views and pixels, in double precision."""
    mean_VChw, std_VChw = np.split(moments.astype(np.float64), 2, axis=1)
    square_VChw = mean_VChw**2 + std_VChw**2
    return np.stack([mean_VChw.sum(axis=(0, 2, 3)), square_VChw.sum(axis=(0, 2, 3))])


def combine_sums(
    sums: Sequence[npt.NDArray[np.float64]], num_samples: int, latent_shape: tuple[int, int, int, int]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of posterior samples, from the sums of all shards.

    For z = mean + std * n, E[z] = E[mean] and E[z^2] = E[mean^2 + std^2].
    """
    views, _, height, width = latent_shape
    mean, square = np.sum(sums, axis=0) / (num_samples * views * height * width)
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    return tuple(round(value, 9) for value in mean.tolist()), tuple(round(value, 9) for value in std.tolist())
