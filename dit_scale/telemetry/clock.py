"""Moments by the clock of a device: an event in the stream of a GPU, the host's time on a CPU.

Marking a moment does not wait for the device; reading the time between two may.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch

Mark = Any
"""A moment: seconds of the host's clock, or a CUDA event."""


def marker(device: torch.device) -> Callable[[], Mark]:
    """Return the function that marks the present moment of a device."""
    return _cuda_event if device.type == "cuda" else time.perf_counter


def seconds_between(start: Mark, end: Mark) -> float:
    """Return the seconds between two marks; on CUDA, waits until the device has reached the second one."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def median_s(work: Callable[[], object], warmup: int, repeats: int, device: torch.device) -> float:
    """Median seconds per call. On CUDA this is device time; the host may run ahead."""
    mark = marker(device)
    for _ in range(warmup):
        work()
    marks = [mark()]
    for _ in range(repeats):
        work()
        marks.append(mark())
    return median(seconds_between(a, b) for a, b in pairwise(marks))


def _cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
