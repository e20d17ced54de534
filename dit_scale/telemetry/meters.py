"""Measurements of each step, kept on the device until a log point reads them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

StepRow = tuple[float, ...]
"""Measurements of one step, by `COLUMNS`."""
COLUMNS = ("loss", "mse", "vb", "grad_norm", "skipped")
"""Columns of a row: global means of the losses, the global gradient norm, 1.0 if the update was skipped."""


class Meters:
    """Rows of the steps since the last log point."""

    def __init__(self, global_batch: int, pending: Sequence[StepRow] = ()) -> None:
        self._global_batch = global_batch
        self._host: list[StepRow] = [tuple(row) for row in pending]
        self._device: list[Tensor] = []
        self._clock = StepClock()

    def add(self, row: Tensor) -> None:
        """Add the row of a step: fp32 (5,), see `COLUMNS`, the same on all ranks."""
        self._device.append(row)
        self._clock.steps += 1

    def exclude(self, seconds: float) -> None:
        """Leave the last seconds, spent on something else than steps, out of the speed."""
        self._clock.since_s += seconds

    def collect(self) -> tuple[StepRow, ...]:
        """Return all rows so far on the host, in the order of the steps; waits for the device."""
        if self._device:
            self._host += [tuple(row) for row in torch.stack(self._device).tolist()]
            self._device.clear()
        return tuple(self._host)

    def take(self) -> dict[str, float | None]:
        """Return means, number of skipped steps and speed since the last log point, and start a new window.

        Means do not include skipped steps; they are None if all steps were skipped.
        """
        *names, flag = COLUMNS
        rows = self.collect()
        self._host.clear()
        good = [values for *values, skipped in rows if not skipped]
        columns = zip(*good, strict=True) if good else [()] * len(names)
        means = {
            name: sum(column) / len(column) if column else None
            for name, column in zip(names, columns, strict=True)
        }
        speed = self._clock.restart() * self._global_batch
        return {**means, flag: len(rows) - len(good), "images_per_s": speed}


@dataclass
class StepClock:
    """Counts steps against wall-clock time."""

    steps: int = 0
    since_s: float = 0.0

    def __post_init__(self) -> None:
        self.since_s = time.monotonic()

    def restart(self) -> float:
        """Return the steps per second so far, and start again from 0."""
        now_s = time.monotonic()
        speed = self.steps / max(now_s - self.since_s, 1e-9)
        self.steps, self.since_s = 0, now_s
        return speed
