"""Moving averages of the fp32 master weights; each rank averages the partitions that it owns.

One fused pass per step and profile over the flat buffers, at any ZeRO stage. The decay is a function of the
step alone, so an average is exactly resumable and does not depend on the world size.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

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


Followers = dict[int, tuple[Tensor, float]]
"""Address of a master => its average and a weight: what an optimizer may move in the pass of its update.

It removes the averages that it has moved.
"""


class Ema:
    """All profiles of one rank.

    Call `start` once, and with each optimizer step `offer` before and `update` after it.
    """

    def __init__(
        self,
        profiles: tuple[EmaProfile, ...],
        owned: tuple[Partition, ...],
        followers: Followers | None = None,
    ) -> None:
        self._profiles, self._owned, self._followers = profiles, owned, followers
        self._offered: set[int] = set()
        for partition in owned:
            for profile in profiles:
                partition.buffers[ema_kind(profile.name)] = torch.empty_like(partition.buffers[MASTER].data)

    @torch.no_grad()
    def start(self) -> None:
        """Set every average to a copy of the masters."""
        for partition in self._owned:
            for profile in self._profiles:
                partition.buffers[ema_kind(profile.name)].copy_(partition.buffers[MASTER])

    def offer(self, step: int) -> None:
        """Let the optimizer's update number `step` move the first profile's averages, if it can."""
        if self._followers is None or not self._profiles:
            return
        first, *_ = self._profiles
        for partition in self._owned:
            average = partition.buffers[ema_kind(first.name)]
            self._followers[partition.buffers[MASTER].data_ptr()] = (average, 1.0 - decay_at(first, step))
        self._offered = set(self._followers)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Apply average += (1 - decay) * (master - average) after `step` optimizer steps.

        Leaves out the averages that were offered to the optimizer and that it has moved.
        """
        moved = self._offered - set(self._followers or ())
        for profile in self._profiles:
            left = [part.buffers for part in self._owned if part.buffers[MASTER].data_ptr() not in moved]
            averages = [buffers[ema_kind(profile.name)] for buffers in left]
            masters = [buffers[MASTER].data for buffers in left]
            if left:
                torch._foreach_lerp_(averages, masters, 1.0 - decay_at(profile, step))
            moved = set()
        self._offered = set()
