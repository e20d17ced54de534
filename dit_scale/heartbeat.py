"""Heartbeats: what a rank is doing, in a small file that its supervisor reads.

A heartbeat is one write into a mapped page. It needs no system call and works as long as the process runs.
Writer and reader use CLOCK_MONOTONIC, which all processes of a node share, so that ages can be computed.
"""

import mmap
import os
import struct
import time
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

FOLDER_VARIABLE = "DIT_SCALE_BEATS"
"""Environment variable with the folder of the heartbeats; unset without a supervisor."""

WINDOW_STEPS = 1000
"""Number of recent steps over which the 99th percentile is taken."""
MEASURED_STEPS = 16
"""Number of steps that must be measured before there is a percentile."""

_SEQUENCE = struct.Struct("<Q")
_RECORD = struct.Struct("<QIIQQd")
"""Sequence number (odd during a write), process id, phase, step, time of the heartbeat in ns, p99 in s."""


class Phase(IntEnum):
    """What a rank is doing. Each phase has its own deadline."""

    START = 0
    """Imports, process group, model and engine."""
    RESTORE = 1
    """Finds and reads a checkpoint; a heartbeat per tensor."""
    RESTORED = 2
    """Has read its part and waits for the other ranks."""
    DATA = 3
    """Waits for the micro-batches of a step."""
    COMPUTE = 4
    """Forward and backward passes, reductions, the optimizer."""
    AGREE = 5
    """Waits for the vote of all ranks."""
    LOG = 6
    SAVE = 7
    """Copies the state for the writer."""
    WAIT_SAVE = 8
    """Waits for a commit; a heartbeat for each vote on whether it is done."""
    EVALUATE = 9
    """Evaluates the weights between two steps; a heartbeat per denoising step and tile."""


def where(phase: Phase, step: int) -> str:
    """Describe where a rank is, for messages; `step` counts the steps that it has taken."""
    if phase <= Phase.RESTORED and step == 0:
        return f"in phase {phase.name} before its first step"
    return f"in phase {phase.name} after step {step}"


@dataclass(frozen=True)
class Beat:
    """One heartbeat of a rank."""

    pid: int
    phase: Phase
    step: int
    """Steps taken."""
    at_s: float
    """Time by time.monotonic."""
    p99_s: float = 0.0
    """99th percentile of the durations of its steps; 0 while unknown."""


class Heart:
    """Sends the heartbeats of this process. Does nothing without a supervisor."""

    def __init__(self, rank: int, folder: str | None = None) -> None:
        folder = folder if folder is not None else os.environ.get(FOLDER_VARIABLE, "")
        self._page: mmap.mmap | None = None
        self._sequence = 0
        self._step, self._step_started_s, self._p99_s = 0, 0.0, 0.0
        self._steps_s: deque[float] = deque(maxlen=WINDOW_STEPS)
        if folder:
            with open(beat_path(Path(folder), rank), "w+b") as file:
                file.truncate(_RECORD.size)
                self._page = mmap.mmap(file.fileno(), _RECORD.size)
        self.beat(Phase.START, 0)

    def beat(self, phase: Phase, step: int) -> None:
        """Send a heartbeat at the start of a phase; `step` counts the steps taken."""
        if self._page is None:
            return
        now_ns = time.monotonic_ns()
        if step != self._step:
            self._measure(step, now_ns / 1e9)
        if phase == Phase.EVALUATE:
            self._step_started_s = 0.0  # the time until the next step is no duration of a step
        odd = self._sequence + 1
        self._sequence += 2
        _SEQUENCE.pack_into(self._page, 0, odd)
        _RECORD.pack_into(self._page, 0, odd, os.getpid(), phase, step, now_ns, self._p99_s)
        _SEQUENCE.pack_into(self._page, 0, self._sequence)

    def _measure(self, step: int, now_s: float) -> None:
        if step == self._step + 1 and self._step_started_s:
            self._steps_s.append(now_s - self._step_started_s)
        self._step, self._step_started_s = step, now_s
        is_due = not self._p99_s or step % MEASURED_STEPS == 0
        if len(self._steps_s) >= MEASURED_STEPS and is_due:
            self._p99_s = sorted(self._steps_s)[len(self._steps_s) * 99 // 100]


def read_beat(path: Path) -> Beat | None:
    """Return the last heartbeat in a file; None before the first, or during a write."""
    try:
        data = path.read_bytes()
        torn = path.read_bytes() != data
    except FileNotFoundError:
        return None
    if torn or len(data) < _RECORD.size:
        return None
    sequence, pid, phase, step, at_ns, p99_s = _RECORD.unpack(data)
    if sequence % 2 or not sequence:
        return None
    return Beat(pid, Phase(phase), step, at_ns / 1e9, p99_s)


def beat_path(folder: Path, rank: int) -> Path:
    """Return the heartbeat file of a rank."""
    return folder / f"beat-{rank:05d}"
