"""How fast the steps between two log points were: marked on each rank, exchanged and combined at a log point.

    waits() -> a micro-batch -> forward pass -> computed() -> backward pass ... -> finished()
    |-------------- own work --------------|

In the backward pass all ranks wait for the slowest one, so only the time before it tells them apart. A step
lasts from the end of the step before it to its own end. After a log point or an evaluation, it starts when it
waits for its first micro-batch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from dit_scale import host_memory
from dit_scale.telemetry.clock import Mark, marker, seconds_between

GIB = 2**30

TIMED_KEYS = (
    "images_per_s",
    "mfu",
    "step_s_p50",
    "step_s_p99",
    "slowest_rank",
    "slowest_ratio",
    "data_wait",
    "memory_gib",
    "memory_peak_gib",
)
"""Keys of a log point whose values differ between two runs of the same configuration."""


@dataclass(frozen=True)
class Work:
    """What a step computes, and what the devices could compute."""

    global_batch: int
    flops_per_image: float
    """Model FLOPs of one sample in a training step; recomputation does not count."""
    flops_per_s: float
    """FLOP/s of a matrix product on one device."""


@dataclass(frozen=True)
class RankFigures:
    """What one rank measured since the last log point."""

    steps: int
    window_s: float
    """Wall-clock time, without evaluations."""
    step_s_p50: float
    step_s_p99: float
    own_s: float
    """Sum over the steps of the time from waiting for a micro-batch to the end of its forward pass."""
    waited_s: float
    """Time spent waiting for micro-batches."""
    memory_bytes: int
    peak_memory_bytes: int


class Pace:
    """Marks the steps of one rank. Nothing waits for the device before `take`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._mark = device, marker(device)
        self._waiting: Mark = None
        """Start of the current micro-step."""
        self._step: Mark = None
        """Start of the current step; None between steps that do not follow each other immediately."""
        self._own: list[tuple[Mark, Mark]] = []
        self._steps: list[tuple[Mark, Mark]] = []
        self._waited_s = 0.0
        self._since_s = time.monotonic()

    def waits(self) -> None:
        """Mark that the rank needs its next micro-batch."""
        self._waiting = self._mark()
        if self._step is None:
            self._step = self._waiting

    def computed(self, *_: object) -> None:
        """Mark the end of a forward pass; an observer of `Trainer.accumulate`."""
        self._own.append((self._waiting, self._mark()))

    def finished(self) -> None:
        """Mark the end of a step."""
        end = self._mark()
        self._steps.append((self._step, end))
        self._step = end

    def exclude(self, seconds: float) -> None:
        """Leave the last seconds, spent on something else than steps, out of the window."""
        self._since_s += seconds
        self._step = None

    def take(self, waited_s: float) -> RankFigures:
        """Return what was measured since the last call, and start a new window; waits for the device.

        `waited_s` is the total time that this rank has waited for micro-batches so far. There must be a step
        since the last call.
        """
        steps_s = [seconds_between(*marks) for marks in self._steps]
        p50, p99 = np.quantile(steps_s, (0.5, 0.99)).tolist()
        now_s = time.monotonic()
        now_bytes, peak_bytes = memory_bytes(self._device)
        figures = RankFigures(
            steps=len(steps_s),
            window_s=now_s - self._since_s,
            step_s_p50=p50,
            step_s_p99=p99,
            own_s=sum(seconds_between(*marks) for marks in self._own),
            waited_s=waited_s - self._waited_s,
            memory_bytes=now_bytes,
            peak_memory_bytes=peak_bytes,
        )
        self._own.clear()
        self._steps.clear()
        self._step = None
        self._waited_s, self._since_s = waited_s, now_s
        return figures


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Return the bytes in use now and their peak so far: of the GPU's tensors, or of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return host_memory.resident()


def over_ranks(ranks: Sequence[RankFigures], work: Work) -> dict[str, float | None]:
    """Combine the figures of all ranks, in their order => values by `TIMED_KEYS`."""
    first = ranks[0]
    own_s = [rank.own_s for rank in ranks]
    slowest = int(np.argmax(own_s))
    step_s = max(rank.step_s_p50 for rank in ranks)
    model_flops_per_s = work.global_batch * work.flops_per_image / step_s
    return {
        "images_per_s": first.steps * work.global_batch / first.window_s,
        "mfu": model_flops_per_s / (len(ranks) * work.flops_per_s),
        "step_s_p50": step_s,
        "step_s_p99": max(rank.step_s_p99 for rank in ranks),
        "slowest_rank": slowest,
        "slowest_ratio": own_s[slowest] / median(own_s),
        "data_wait": max(rank.waited_s / rank.window_s for rank in ranks),
        "memory_gib": max(rank.memory_bytes for rank in ranks) / GIB,
        "memory_peak_gib": max(rank.peak_memory_bytes for rank in ranks) / GIB,
    }
