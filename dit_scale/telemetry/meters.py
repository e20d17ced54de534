"""What a step measures, kept on the device until a log point asks for it.

A row is (total loss, mse, bound, gradient norm) of one step. Losses are this rank's sums until
`collect` adds them over the ranks and divides by the global batch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_scale.dist import World

Row = tuple[float, ...]
COLUMNS = ("loss", "mse", "vb", "grad_norm")


class Meters:
    """Rows of the steps since the last log point."""

    def __init__(self, world: World, global_batch: int, pending: Sequence[Row] = ()) -> None:
        self._world, self._global_batch = world, global_batch
        self._host: list[Row] = [tuple(row) for row in pending]
        self._device: list[Tensor] = []
        self._clock = StepClock()

    def add(self, loss_sums: Tensor, grad_norm: Tensor | float) -> None:
        """One step: fp32 (3,) loss sums of this rank, and the global gradient norm."""
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=loss_sums.device)
        self._device.append(torch.cat((loss_sums.detach() / self._global_batch, norm.detach().reshape(1))))
        self._clock.steps += 1

    def collect(self) -> tuple[Row, ...]:
        """All rows so far, on the host and summed over ranks; waits for the device."""
        if self._device:
            rows = torch.stack(self._device)
            rows[:, :3] = self._world.sum(rows[:, :3].contiguous())
            self._host += [tuple(row) for row in rows.tolist()]
            self._device.clear()
        return tuple(self._host)

    def take(self) -> dict[str, float]:
        """The means since the last log point and the speed; starts the next window."""
        rows = self.collect()
        self._host.clear()
        means = {
            name: sum(column) / len(rows)
            for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)
        }
        return {**means, "images_per_s": self._clock.restart() * self._global_batch}


@dataclass
class StepClock:
    """Steps per second of wall-clock time since the last `restart`."""

    steps: int = 0
    since_s: float = 0.0

    def __post_init__(self) -> None:
        self.since_s = time.monotonic()

    def restart(self) -> float:
        now_s = time.monotonic()
        speed = self.steps / max(now_s - self.since_s, 1e-9)
        self.steps, self.since_s = 0, now_s
        return speed
