"""What a rank is doing, in a small file that its supervisor reads from outside.

A beat is one write into a mapped page: it costs no system call and works as long as the process runs.
The reader compares beats with the same clock: CLOCK_MONOTONIC is one for all processes of a node.
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
"""Environment variable with the folder of the beats; without it nobody watches."""

WINDOW_STEPS = 1000
"""Steps of which the 99th percentile is taken; until there are MEASURED_STEPS, there is none."""
MEASURED_STEPS = 16

_SEQUENCE = struct.Struct("<Q")
_RECORD = struct.Struct("<QIIQQd")
"""Sequence number (odd while it is written), process id, section, step, time of the beat in ns, p99 in s."""


class Phase(IntEnum):
    """What a rank does at the moment; each has a deadline of its own."""

    START = 0
    """Imports, process group, model and engine."""
    RESTORE = 1
    """Looks for a checkpoint and reads it; a beat for each tensor."""
    RESTORED = 2
    """Has read its part, and waits for the others."""
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
    """Waits for a commit; a beat for each vote on whether it is there."""


def place(section: Phase, step: int) -> str:
    """Where a rank stands, in words that follow on what it does there; `step` are those that it has taken."""
    if section <= Phase.RESTORED and step == 0:
        return f"in {section.name}, before its first step"
    return f"in {section.name} of step {step}"


@dataclass(frozen=True)
class Beat:
    """What a rank said last."""

    pid: int
    section: Phase
    step: int
    at_s: float
    """Of time.monotonic."""
    p99_s: float = 0.0
    """99th percentile of the times of its steps; 0 while it is not known."""


class Heart:
    """Beats for this process; where nobody watches it does nothing."""

    def __init__(self, rank: int, folder: str | None = None) -> None:
        folder = folder if folder is not None else os.environ.get(FOLDER_VARIABLE, "")
        self._page: mmap.mmap | None = None
        self._sequence = 0
        self._step, self._step_began_s, self._p99_s = 0, 0.0, 0.0
        self._steps_s: deque[float] = deque(maxlen=WINDOW_STEPS)
        if folder:
            with open(beat_path(Path(folder), rank), "w+b") as file:
                file.truncate(_RECORD.size)
                self._page = mmap.mmap(file.fileno(), _RECORD.size)
        self.beat(Phase.START, 0)

    def beat(self, section: Phase, step: int) -> None:
        """Say what comes now, and in which step."""
        if self._page is None:
            return
        now_ns = time.monotonic_ns()
        if step != self._step:
            self._measure(step, now_ns / 1e9)
        odd = self._sequence + 1
        self._sequence += 2
        _SEQUENCE.pack_into(self._page, 0, odd)
        _RECORD.pack_into(self._page, 0, odd, os.getpid(), section, step, now_ns, self._p99_s)
        _SEQUENCE.pack_into(self._page, 0, self._sequence)

    def _measure(self, step: int, now_s: float) -> None:
        if step == self._step + 1 and self._step_began_s:
            self._steps_s.append(now_s - self._step_began_s)
        self._step, self._step_began_s = step, now_s
        is_due = not self._p99_s or step % MEASURED_STEPS == 0
        if len(self._steps_s) >= MEASURED_STEPS and is_due:
            self._p99_s = sorted(self._steps_s)[len(self._steps_s) * 99 // 100]


def read_beat(path: Path) -> Beat | None:
    """The last beat of a rank; None before its first, or while it writes one."""
    try:
        data = path.read_bytes()
        torn = path.read_bytes() != data
    except FileNotFoundError:
        return None
    if torn or len(data) < _RECORD.size:
        return None
    sequence, pid, section, step, at_ns, p99_s = _RECORD.unpack(data)
    if sequence % 2 or not sequence:
        return None
    return Beat(pid, Phase(section), step, at_ns / 1e9, p99_s)


def beat_path(folder: Path, rank: int) -> Path:
    return folder / f"beat-{rank:05d}"
