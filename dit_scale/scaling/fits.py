"""Fits over the runs of a study: a power law with its standard error, and the correlation of the paper.

Shapes: N runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """y = scale * x^exponent."""

    scale: float
    exponent: float
    exponent_standard_error: float | None
    """None for two points, through which every power law passes."""
    points: int

    def __call__(self, x: float) -> float:
        """Return y."""
        return float(self.scale * x**self.exponent)


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Fit y = a x^b by least squares of log y on log x; None for fewer than two different positive points."""
    x_N, y_N = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(set(x)) < 2 or x_N.min() <= 0 or y_N.min() <= 0:
        return None
    log_x_N, log_y_N = np.log(x_N), np.log(y_N)
    centred_N = log_x_N - log_x_N.mean()
    exponent = float(centred_N @ log_y_N / (centred_N @ centred_N))
    offset = float(log_y_N.mean() - exponent * log_x_N.mean())
    residuals_N = log_y_N - offset - exponent * log_x_N
    freedom = len(x_N) - 2
    error = float(np.sqrt(residuals_N @ residuals_N / freedom / (centred_N @ centred_N))) if freedom else None
    return PowerLaw(float(np.exp(offset)), exponent, error, len(x_N))


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation of log10 x and y, as the paper correlates Gflops and FID.

    None for fewer than three points, or if either does not vary.
    """
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(np.log10(np.asarray(x, np.float64)), np.asarray(y, np.float64))[0, 1])
