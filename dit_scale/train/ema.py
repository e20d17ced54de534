"""Moving averages of the fp32 master weights; each rank averages the partitions that it owns.

One fused pass per step and profile over the flat buffers, at any ZeRO stage. The decay is a function of the
step alone, so an average is exactly resumable and does not depend on the world size.
"""

from functools import lru_cache

import numpy as np
import torch

from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.config import EmaProfile


def ema_kind(profile: str) -> str:
    """The kind of a profile's state, in a partition's buffers and in checkpoints."""
    return f"ema.{profile}"


@lru_cache
def power_gamma(sigma_rel: float) -> float:
    """The exponent of the power-function profile with this relative width.

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", Eq. 126:
    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for the largest real root.
    """
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def decay_at(profile: EmaProfile, step: int) -> float:
    """The weight of the old average in the update after step `step` (counted from 1).

    Constant, or beta = (1 - 1/t)^(gamma + 1) for a power function (Karras et al. 2024, Eq. 127). Beta is 0
    at t = 1: the initial weights are forgotten immediately.
    """
    if profile.decay is not None:
        return profile.decay
    assert profile.sigma_rel is not None
    return float((1 - 1 / step) ** (power_gamma(profile.sigma_rel) + 1))


class Ema:
    """All profiles of one rank. Call `start` once and `update` after each optimizer step."""

    def __init__(self, profiles: tuple[EmaProfile, ...], owned: tuple[Partition, ...]) -> None:
        self._profiles, self._owned = profiles, owned
        for partition in owned:
            for profile in profiles:
                partition.buffers[ema_kind(profile.name)] = torch.empty_like(partition.buffers[MASTER].data)

    @torch.no_grad()
    def start(self) -> None:
        """Set every average to a copy of the masters."""
        for partition in self._owned:
            for profile in self._profiles:
                partition.buffers[ema_kind(profile.name)].copy_(partition.buffers[MASTER])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Apply average += (1 - decay) * (master - average) after `step` optimizer steps."""
        masters = [partition.buffers[MASTER].data for partition in self._owned]
        for profile in self._profiles:
            averages = [partition.buffers[ema_kind(profile.name)] for partition in self._owned]
            torch._foreach_lerp_(averages, masters, 1.0 - decay_at(profile, step))
