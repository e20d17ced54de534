"""Whether a step may move the weights: judged on the device from its loss and its gradient norm.

A failed step is passed over: masters, moments and AdamW's count of updates stay as they are, bit for bit.
Its samples are used up all the same, the step counts, and the averages of the weights take it like any
other.
"""

import torch
from torch import Tensor

from dit_scale.config import GuardConfig

KEYS = ("loss", "grad_norm", "updates", "failed_in_a_row")


class Guard:
    """Judges step after step, and remembers what it takes to judge the next one.

    A step fails when its loss or its gradient norm is not finite. With a `spike_factor` it fails also when
    either of them is larger than `spike_factor` times its running mean, from `horizon_steps` updates on.

    A running mean takes accepted steps only. After the n-th of them, with the value x,

        mean_n = mean_{n-1} + (x - mean_{n-1}) / min(n, horizon_steps)

    the plain mean at first, then an exponential one that forgets 1 / horizon_steps of itself in each step.

    All of it is fp32 on the device. Loss and norm are the global ones, the same on all ranks, so that all
    ranks judge alike.
    """

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self._config = config
        self._means = torch.zeros(2, device=device)
        self._updates = torch.zeros((), device=device)
        self._failed_in_a_row = torch.zeros((), device=device)

    def start(self) -> None:
        """Forget everything, as before the first step."""
        for memory in (self._means, self._updates, self._failed_in_a_row):
            memory.zero_()

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 when this step failed, else 0.0: fp32 (). Call once per step; nothing is read back."""
        measured = torch.stack((loss, norm))
        fine = measured.isfinite().all()
        if self._config.spike_factor:
            spikes = (measured > self._config.spike_factor * self._means).any()
            fine &= ~(spikes & (self._updates >= self._config.horizon_steps))
        self._updates = self._updates + fine
        reach = self._updates.clamp(max=self._config.horizon_steps)
        self._means = torch.where(fine, self._means + (measured - self._means) / reach, self._means)
        self._failed_in_a_row = (self._failed_in_a_row + 1.0) * ~fine
        return (~fine).float()

    def state(self) -> dict[str, float]:
        """All that it remembers, by `KEYS`, exactly; waits for the device."""
        counts = torch.stack((self._updates, self._failed_in_a_row))
        return dict(zip(KEYS, torch.cat((self._means, counts)).tolist(), strict=True))

    def restore(self, state: dict[str, float]) -> None:
        """Go on from what `state` returned."""
        loss, grad_norm, updates, failed_in_a_row = (state[key] for key in KEYS)
        self._means.copy_(torch.tensor((loss, grad_norm)))
        self._updates.fill_(updates)
        self._failed_in_a_row.fill_(failed_in_a_row)
