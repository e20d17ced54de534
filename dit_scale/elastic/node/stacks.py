"""Stacks of ranks: asked for by a signal, written by faulthandler beside the interpreter, read from files."""

import re
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

STACK_SIGNAL = signal.SIGUSR2
"""Has a rank write the stacks of its threads down, behind what it wrote before."""
STACKS_S = 2.0
"""Time that ranks have for it."""

_PAUSE_S = 0.05
_COLLECTIVE = re.compile(r'^  File ".*(/torch/distributed/|/dit_scale/dist\.py)', re.MULTILINE)


def stack_path(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return folder / f"stack-{rank:05d}"


def ask_for_stacks(folder: Path, ranks: Iterable[int], signal_to: Callable[[int], None]) -> dict[int, str]:
    """The stacks of these ranks as they are now; what a rank did not write within STACKS_S is missing.

    `signal_to` sends a rank the signal.
    """
    paths = {rank: stack_path(folder, rank) for rank in ranks}
    before = {rank: _size(path) for rank, path in paths.items()}
    for rank in paths:
        signal_to(rank)
    end_s = time.monotonic() + STACKS_S
    sizes: dict[int, int] = {}
    # written in many pieces: it is whole when it grows no more
    while (now := {rank: _size(path) for rank, path in paths.items()}) != sizes or any(
        now[rank] == before[rank] for rank in now
    ):
        if time.monotonic() > end_s:
            break
        sizes = now
        time.sleep(_PAUSE_S)
    texts = {rank: path.read_text()[before[rank] :] for rank, path in paths.items() if path.exists()}
    return {rank: text for rank, text in texts.items() if text}


def is_in_collective(stacks: str) -> bool:
    """Whether a thread stands inside a collective: the rank waits for others."""
    return _COLLECTIVE.search(stacks) is not None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
