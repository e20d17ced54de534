"""The guard decides on the device, from loss and gradient norm, whether a step may update the weights.

The update of a failed step is skipped: masters, moments and AdamW's update count stay the same, bit for bit.
The step still counts, its samples are consumed, and the EMA profiles are updated as in any other step.
"""

import torch
from torch import Tensor

from dit_scale.config import GuardConfig

KEYS = ("loss", "grad_norm", "updates", "failed_in_a_row")


class Guard:
    """Judges one step after another, against running means of the accepted ones.

    A step fails when its loss or its gradient norm is not finite. With a `spike_factor`, and after
    `horizon_steps` updates, it also fails when either exceeds `spike_factor` times its running mean.

    Failed steps do not enter the means. After the n-th accepted step, with the value x,

        mean_n = mean_{n-1} + (x - mean_{n-1}) / min(n, horizon_steps)

    This is the plain mean at first, then an exponential one that forgets 1 / horizon_steps in each step.

    All state is fp32 on the device. Loss and norm are the global ones, equal on all ranks, so all ranks
    reach the same verdict.
    """

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self._config = config
        self._means = torch.zeros(2, device=device)
        self._updates = torch.zeros((), device=device)
        self._failed_in_a_row = torch.zeros((), device=device)

    def start(self) -> None:
        """Reset the state to that before the first step."""
        for tensor in (self._means, self._updates, self._failed_in_a_row):
            tensor.zero_()

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return 1.0 for a failed step, else 0.0; fp32 (). Call it once per step; it does not wait."""
        measured = torch.stack((loss, norm))
        accepted = measured.isfinite().all()
        if self._config.spike_factor:
            spikes = (measured > self._config.spike_factor * self._means).any()
            accepted &= ~(spikes & (self._updates >= self._config.horizon_steps))
        self._updates = self._updates + accepted
        window = self._updates.clamp(max=self._config.horizon_steps)
        self._means = torch.where(accepted, self._means + (measured - self._means) / window, self._means)
        self._failed_in_a_row = (self._failed_in_a_row + 1.0) * ~accepted
        return (~accepted).float()

    def state(self) -> dict[str, float]:
        """The exact state, by `KEYS`. Waits for the device."""
        counts = torch.stack((self._updates, self._failed_in_a_row))
        return dict(zip(KEYS, torch.cat((self._means, counts)).tolist(), strict=True))

    def restore(self, state: dict[str, float]) -> None:
        """Restore what `state` returned."""
        loss, grad_norm, updates, failed_in_a_row = (state[key] for key in KEYS)
        self._means.copy_(torch.tensor((loss, grad_norm)))
        self._updates.fill_(updates)
        self._failed_in_a_row.fill_(failed_in_a_row)
