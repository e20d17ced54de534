"""Post-hoc EMA: an average of a width that nobody tracked, from stored averages of other widths.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", Section 3.2 and
Appendix C. An average is linear in the weights of all steps: at step t, with exponent gamma, it is their
integral over the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)    for 0 <= tau <= t, else 0.

So the combination of stored averages whose profile is nearest to the wanted one is the combination that is
nearest to the wanted average. Nothing is lost by the continuous form: the update of `dit_scale.train.ema`
gives step i the integral of p from i - 1 to i exactly, its decays being ratios of powers of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_scale.errors import CheckpointError
from dit_scale.train.ema import power_gamma

MAX_ERROR = 0.05
"""Largest error that `fit` takes for a good fit."""


@dataclass(frozen=True)
class PowerProfile:
    """The power-function average of this relative width at this step."""

    sigma_rel: float
    step: int
    """Optimizer steps taken, at least 1."""


@dataclass(frozen=True)
class Fit:
    """A combination of stored averages."""

    weights: tuple[float, ...]
    """Of each stored average; they sum to 1, and those of later steps than the target's are 0."""
    error: float
    """Distance between the profiles, relative to the length of the wanted one (both in L2).

    The average itself is off by this much of its noise if the weights of different steps are independent;
    it is nearer when they drift, as trained weights do."""


def overlaps(rows: Sequence[PowerProfile], columns: Sequence[PowerProfile]) -> np.ndarray:
    """Cosine of every row's profile and every column's, float64 of shape (rows, columns).

    The integral of the product of two profiles over both lengths; with a and b for gamma, and b that of
    the later step: sqrt((2a + 1)(2b + 1)) / (a + b + 1) * (earlier step / later step)^(b + 1/2).
    """
    gamma_1, step_1 = (values[:, None] for values in _gammas_and_steps(rows))
    gamma_2, step_2 = _gammas_and_steps(columns)
    gamma_late = np.where(step_1 > step_2, gamma_1, gamma_2)
    ratio = np.minimum(step_1, step_2) / np.maximum(step_1, step_2)
    height = np.sqrt((2 * gamma_1 + 1) * (2 * gamma_2 + 1)) / (gamma_1 + gamma_2 + 1)
    cosines: np.ndarray = height * ratio ** (gamma_late + 0.5)
    return cosines


def lengths(profiles: Sequence[PowerProfile]) -> np.ndarray:
    """L2 norm of each profile, (gamma + 1) / sqrt((2 gamma + 1) t), float64."""
    gamma, step = _gammas_and_steps(profiles)
    norms: np.ndarray = (gamma + 1) / np.sqrt((2 * gamma + 1) * step)
    return norms


def fit(stored: Sequence[PowerProfile], target: PowerProfile) -> Fit:
    """The combination of stored averages, all different, with the profile nearest to the target's.

    Weights that sum to 1, unlike plain least squares, keep what all averages have in common exact; it is
    most of a trained model. Raises CheckpointError when the error is above `MAX_ERROR`.
    """
    past = [profile for profile in stored if profile.step <= target.step]
    if not past:
        raise CheckpointError(f"no power-function average is stored up to step {target.step}")
    products, wanted = overlaps(past, past), overlaps(past, [target])[:, 0]
    scale = lengths([target]) / lengths(past)  # from a share of the target's length to a weight
    free, shift = np.linalg.lstsq(products, np.stack([wanted, scale], axis=1))[0].T
    shares = free + shift * (1 - scale @ free) / (scale @ shift)
    error = float(np.sqrt(max(0.0, 1 - 2 * wanted @ shares + shares @ products @ shares)))
    if error > MAX_ERROR:
        raise CheckpointError(_refusal(stored, target, error))
    weights = dict(zip(past, (shares * scale).tolist(), strict=True))
    return Fit(tuple(weights.get(profile, 0.0) for profile in stored), error)


def _gammas_and_steps(profiles: Sequence[PowerProfile]) -> tuple[np.ndarray, np.ndarray]:
    gammas = [power_gamma(profile.sigma_rel) for profile in profiles]
    return np.array(gammas), np.array([float(profile.step) for profile in profiles])


def _refusal(stored: Sequence[PowerProfile], target: PowerProfile, error: float) -> str:
    widths = ", ".join(f"{width:g}" for width in sorted({profile.sigma_rel for profile in stored}))
    steps = sorted({profile.step for profile in stored}, key=lambda step: (abs(step - target.step), step))
    if target.step in steps:
        advice = "ask for a sigma_rel nearer to theirs, or store more often (checkpoint.ema_every_steps)"
    else:
        advice = f"ask for a step at which there are some, as {' or '.join(map(str, steps[:2]))}"
    return (
        f"the average of sigma_rel {target.sigma_rel:g} at step {target.step} would be off by {error:.1%}, "
        f"expected at most {MAX_ERROR:.0%}, from the {len(stored)} stored ones of sigma_rel {widths} "
        f"at steps {min(steps)} to {max(steps)}; {advice}"
    )
