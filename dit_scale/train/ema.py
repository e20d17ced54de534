"""Moving averages of the fp32 master weights, each rank keeping those of what it owns.

One fused pass per step and profile over the flat buffers, for any ZeRO stage. Decay is a function of
the step alone, so an average is exactly resumable and does not depend on the world size.
"""

from functools import lru_cache

import numpy as np
import torch

from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.config import EmaProfile


def ema_kind(profile: str) -> str:
    """The kind under which a profile stands among a partition's buffers and in checkpoints."""
    return f"ema.{profile}"


@lru_cache
def power_gamma(sigma_rel: float) -> float:
    """The exponent of a power-function profile from its relative width.

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", Eq. 126:
    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for the largest real root.
    """
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def decay_at(profile: EmaProfile, step: int) -> float:
    """The weight of the old average when step `step` (counted from 1) has been taken.

    Constant, or the power function's beta = (1 - 1/t)^(gamma + 1) (Karras et al. 2024, Eq. 127), which
    is 0 at t = 1: the initial weights are forgotten at once.
    """
    if profile.decay is not None:
        return profile.decay
    assert profile.sigma_rel is not None
    return float((1 - 1 / step) ** (power_gamma(profile.sigma_rel) + 1))


class Ema:
    """All profiles of one rank. `start` copies the masters; `update` follows each optimizer step."""

    def __init__(self, profiles: tuple[EmaProfile, ...], owned: tuple[Partition, ...]) -> None:
        self._profiles, self._owned = profiles, owned
        for partition in owned:
            for profile in profiles:
                partition.buffers[ema_kind(profile.name)] = torch.empty_like(partition.buffers[MASTER].data)

    @torch.no_grad()
    def start(self) -> None:
        """Every average begins as the initial copy of the masters."""
        for partition in self._owned:
            for profile in self._profiles:
                partition.buffers[ema_kind(profile.name)].copy_(partition.buffers[MASTER])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average += (1 - decay) * (master - average), after `step` optimizer steps."""
        masters = [partition.buffers[MASTER].data for partition in self._owned]
        for profile in self._profiles:
            averages = [partition.buffers[ema_kind(profile.name)] for partition in self._owned]
            torch._foreach_lerp_(averages, masters, 1.0 - decay_at(profile, step))
