"""Post-hoc EMA: reconstruct an average of a width that was not tracked from stored averages of other widths.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", Section 3.2 and
Appendix C. An average is linear in the weights of all steps: at step t, with exponent gamma, it is the
integral of the weights over the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)    for 0 <= tau <= t, else 0.

The combination of stored averages whose profile is closest to the target profile therefore approximates the
target average. The continuous form is exact here: the update in `dit_scale.train.ema` gives step i the
integral of p from i - 1 to i, because its decays are ratios of powers of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_scale.errors import CheckpointError
from dit_scale.train.ema import power_gamma

MAX_ERROR = 0.05
"""Largest error that `fit` accepts."""


@dataclass(frozen=True)
class PowerProfile:
    """The profile of a power-function average: its relative width and its step."""

    sigma_rel: float
    step: int
    """Optimizer steps taken, at least 1."""


@dataclass(frozen=True)
class Fit:
    """A linear combination of stored averages."""

    weights: tuple[float, ...]
    """One weight per stored average. They sum to 1; averages after the target's step have weight 0."""
    error: float
    """L2 distance between the fitted and the target profile, relative to the L2 norm of the target.

    If the weights of different steps were independent, this would be the error of the average relative to
    its noise. Trained weights drift slowly, so the actual error is smaller."""


def overlaps(rows: Sequence[PowerProfile], columns: Sequence[PowerProfile]) -> np.ndarray:
    """Cosine similarity of each pair of profiles => float64 (rows, columns).

    It is the inner product of two profiles divided by their norms. With exponents a and b, where b belongs
    to the later step: sqrt((2a + 1)(2b + 1)) / (a + b + 1) * (earlier step / later step)^(b + 1/2).
    """
    gamma_1, step_1 = (values[:, None] for values in _gammas_and_steps(rows))
    gamma_2, step_2 = _gammas_and_steps(columns)
    gamma_late = np.where(step_1 > step_2, gamma_1, gamma_2)
    ratio = np.minimum(step_1, step_2) / np.maximum(step_1, step_2)
    height = np.sqrt((2 * gamma_1 + 1) * (2 * gamma_2 + 1)) / (gamma_1 + gamma_2 + 1)
    cosines: np.ndarray = height * ratio ** (gamma_late + 0.5)
    return cosines


def lengths(profiles: Sequence[PowerProfile]) -> np.ndarray:
    """L2 norm of each profile, (gamma + 1) / sqrt((2 gamma + 1) t) => float64."""
    gamma, step = _gammas_and_steps(profiles)
    norms: np.ndarray = (gamma + 1) / np.sqrt((2 * gamma + 1) * step)
    return norms


def fit(stored: Sequence[PowerProfile], target: PowerProfile) -> Fit:
    """Fit the target profile with a combination of distinct stored profiles, by constrained least squares.

    The weights sum to 1, so whatever all averages have in common, which is most of a trained model, is
    reproduced exactly. Raises CheckpointError if the error exceeds `MAX_ERROR`.
    """
    past = [profile for profile in stored if profile.step <= target.step]
    if not past:
        raise CheckpointError(f"no power-function average is stored at or before step {target.step}")
    cosines, target_cosines = overlaps(past, past), overlaps(past, [target])[:, 0]
    scale = lengths([target]) / lengths(past)  # converts a multiple of the target's norm to a weight
    free, shift = np.linalg.lstsq(cosines, np.stack([target_cosines, scale], axis=1))[0].T
    shares = free + shift * (1 - scale @ free) / (scale @ shift)
    error = float(np.sqrt(max(0.0, 1 - 2 * target_cosines @ shares + shares @ cosines @ shares)))
    if error > MAX_ERROR:
        raise CheckpointError(_poor_fit(stored, target, error))
    weights = dict(zip(past, (shares * scale).tolist(), strict=True))
    return Fit(tuple(weights.get(profile, 0.0) for profile in stored), error)


def _gammas_and_steps(profiles: Sequence[PowerProfile]) -> tuple[np.ndarray, np.ndarray]:
    gammas = [power_gamma(profile.sigma_rel) for profile in profiles]
    return np.array(gammas), np.array([float(profile.step) for profile in profiles])


def _poor_fit(stored: Sequence[PowerProfile], target: PowerProfile, error: float) -> str:
    widths = ", ".join(f"{width:g}" for width in sorted({profile.sigma_rel for profile in stored}))
    steps = sorted({profile.step for profile in stored}, key=lambda step: (abs(step - target.step), step))
    if target.step in steps:
        advice = "choose a sigma_rel closer to theirs, or store more often (checkpoint.ema_every_steps)"
    else:
        advice = f"choose a step with stored averages, for example {' or '.join(map(str, steps[:2]))}"
    return (
        f"reconstructing sigma_rel {target.sigma_rel:g} at step {target.step} has an error of {error:.1%}, "
        f"expected at most {MAX_ERROR:.0%}; {len(stored)} averages of sigma_rel {widths} are stored "
        f"at steps {min(steps)} to {max(steps)}; {advice}"
    )
