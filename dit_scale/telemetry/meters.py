"""Measurements of each step, kept on the device until a log point reads them."""

from collections.abc import Sequence

import torch
from torch import Tensor

QUARTERS = 4
"""Parts of the timesteps by which losses are reported; part 0 is the least noisy."""

StepRow = tuple[float, ...]
"""Measurements of one step, by `COLUMNS` and `SAMPLE_COLUMNS`."""
COLUMNS = ("loss", "mse", "vb", "grad_norm", "skipped")
"""First columns of a row: global means of the losses, the global gradient norm, 1.0 if the update was
skipped."""
SKIPPED = COLUMNS.index("skipped")
SAMPLE_COLUMNS = (
    "loss_max",
    *(f"loss_q{quarter}" for quarter in range(QUARTERS)),
    *(f"samples_q{quarter}" for quarter in range(QUARTERS)),
)
"""Further columns: the largest loss of a sample; by quarter of the timesteps, the sum of the losses and the
number of samples. Rows that an earlier version saved do not have them."""


class Meters:
    """Rows of the steps since the last log point."""

    def __init__(self, pending: Sequence[StepRow] = ()) -> None:
        """`pending` are the rows that a checkpoint carries; those of an earlier version count no samples."""
        width = len(COLUMNS) + len(SAMPLE_COLUMNS)
        self._host: list[StepRow] = [(*row, *[0.0] * (width - len(row))) for row in pending]
        self._device: list[Tensor] = []

    def add(self, row: Tensor) -> None:
        """Add the row of a step: fp32 (14,), see `COLUMNS`, the same on all ranks."""
        self._device.append(row)

    def collect(self) -> tuple[StepRow, ...]:
        """Return all rows so far on the host, in the order of the steps; waits for the device."""
        if self._device:
            self._host += [tuple(row) for row in torch.stack(self._device).tolist()]
            self._device.clear()
        return tuple(self._host)

    def take(self) -> dict[str, float | None]:
        """Return what the steps since the last log point measured, and start a new window.

        Means over the steps by `COLUMNS`, the number of skipped steps, the largest loss of a sample, and the
        mean loss of the samples of each quarter. Nothing but that number includes skipped steps; a value is
        None if there was nothing to measure.
        """
        rows = self.collect()
        self._host.clear()
        good = [row for row in rows if not row[SKIPPED]]
        means = {name: _mean([row[i] for row in good]) for i, name in enumerate(COLUMNS) if i != SKIPPED}
        return {**means, "skipped": len(rows) - len(good), **_by_sample(good)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _by_sample(rows: Sequence[StepRow]) -> dict[str, float | None]:
    """Combine `SAMPLE_COLUMNS` over steps."""
    columns = [[row[len(COLUMNS) + i] for row in rows] for i in range(len(SAMPLE_COLUMNS))]
    maxima, *sums = columns
    losses, counts = ([sum(column) for column in part] for part in (sums[:QUARTERS], sums[QUARTERS:]))
    quarters = {
        f"loss_q{quarter}": loss / count if count else None
        for quarter, (loss, count) in enumerate(zip(losses, counts, strict=True))
    }
    return {"loss_max": max(maxima) if any(counts) else None, **quarters}
