"""Curves of a bounded number of points that lose no spike and no gap.

Shapes: N points. x int64 (N,) ascending, y float64 (N,); a value that is not finite is NaN, a gap.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Curve:
    """A curve to which points are appended, thinned to at most `max_points` (8 or more)."""

    def __init__(self, max_points: int) -> None:
        assert max_points >= 8
        self._max_points = max_points
        self._width = 1
        self.x: Ints = np.empty(0, np.int64)
        self.y: Floats = np.empty(0)

    def extend(self, x_N: Ints, y_N: Floats) -> None:
        """Append points. Points out of order, as after a step that was taken again, are sorted in."""
        x, y = np.concatenate([self.x, x_N]), np.concatenate([self.y, y_N])
        if len(x) and np.any(x[1:] < x[:-1]):
            order = np.argsort(x, kind="stable")
            x, y = x[order], y[order]
        if len(x) > self._max_points:
            x, y = thinned(x, y, self._width)
        while len(x) > self._max_points:
            self._width *= 2
            x, y = thinned(x, y, self._width)
        self.x, self.y = x, y


def thinned(x_N: Ints, y_N: Floats, width: int) -> tuple[Ints, Floats]:
    """Keep the smallest value, the largest and the first gap of every `width` steps, and the last point.

    Thinning a thinned curve by a multiple of `width` gives the same as thinning the whole curve at once.
    """
    bucket_N = x_N // width
    starts_B = np.flatnonzero(np.diff(bucket_N, prepend=bucket_N[0] - 1))
    place_N = np.repeat(np.arange(len(starts_B)), np.diff(starts_B, append=len(x_N)))
    is_gap_N = np.isnan(y_N)
    low_B = np.minimum.reduceat(np.where(is_gap_N, np.inf, y_N), starts_B)
    high_B = np.maximum.reduceat(np.where(is_gap_N, -np.inf, y_N), starts_B)
    kept = [_firsts(mask, place_N) for mask in (y_N == low_B[place_N], y_N == high_B[place_N], is_gap_N)]
    chosen = np.unique(np.concatenate([*kept, [len(x_N) - 1]]))
    return x_N[chosen], y_N[chosen]


def _firsts(mask_N: NDArray[np.bool_], place_N: Ints) -> Ints:
    """Return the index of the first True of each bucket that has one."""
    indices = np.flatnonzero(mask_N)
    return indices[np.flatnonzero(np.diff(place_N[indices], prepend=-1))]
