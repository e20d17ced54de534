"""Which samples of a data set are held out: no run trains on them, and the held-out loss is computed on them.

Whether a sample is held out follows from its id, the share and a seed alone. So it depends neither on the
order of training nor on the world size or the number of samples, and it needs no index of any shard. A larger
share holds out the same samples and more.

The hash of a sample is an output of SplitMix64, as in `order`. docs/formats.md has golden vectors.
"""

import numpy as np
from numpy.typing import NDArray

from dit_scale.data.order import mix64, round_keys
from dit_scale.errors import ConfigError

Mask = NDArray[np.bool_]
"""By sample id: whether the sample is held out."""

_BRANCH = 2**63
"""The branch of the order's keys; windows of shards have small numbers."""
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def held_out_mask(num_samples: int, share: float, seed: int) -> Mask | None:
    """Return which of the samples are held out; None if `share` is 0.

    Raises ConfigError if the share leaves no sample on one of the two sides.
    """
    if not share:
        return None
    mask = fractions(num_samples, seed) < share
    if mask.all() or not mask.any():
        raise ConfigError(
            f"evaluate.held_out={share:g} holds out {np.count_nonzero(mask)} of {num_samples} samples; "
            "expected some, but not all: choose another share"
        )
    return mask


def fractions(num_samples: int, seed: int) -> NDArray[np.float64]:
    """Return a number in [0, 1) per sample id; those below the share are held out."""
    counts = np.arange(1, num_samples + 1, dtype=np.uint64)
    words = mix64(round_keys(seed, 0, _BRANCH)[0] + counts * _GAMMA)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
