"""Stacks of ranks, requested by a signal. faulthandler writes them even while the interpreter hangs."""

import re
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dit_scale.lines import Say

STACK_SIGNAL = signal.SIGUSR2
"""Makes a rank append the stacks of its threads to its stack file."""
STACKS_S = 5.0
"""Longest wait for stacks that were requested."""

_PAUSE_S = 0.05
_COLLECTIVE = re.compile(r'^  File ".*(/torch/distributed/|/dit_scale/dist\.py)', re.MULTILINE)


class StackArchive:
    """The folder in which the stacks of one round are kept."""

    def __init__(self, folder: Path, round_number: int, say: Say) -> None:
        self.folder = folder
        self._round_number, self._say = round_number, say

    def write(self, stacks: Mapping[int, str]) -> None:
        """Keep the stacks of these ranks, replacing earlier ones. A disk error is an alarm, nothing more."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for rank, text in stacks.items():
                (self.folder / f"round-{self._round_number:06d}-rank-{rank:05d}.stack").write_text(text)
        except OSError as error:
            self._say(f"ALARM: cannot keep the stacks of ranks in {self.folder}: {error.strerror}")


def stack_path(folder: Path, rank: int) -> Path:
    """Return the file to which a rank writes its stacks."""
    return folder / f"stack-{rank:05d}"


def ask_for_stacks(folder: Path, ranks: Iterable[int], signal_to: Callable[[int], None]) -> dict[int, str]:
    """Return the current stacks of these ranks; a rank that does not answer within STACKS_S is missing.

    `signal_to` sends STACK_SIGNAL to a rank.
    """
    paths = {rank: stack_path(folder, rank) for rank in ranks}
    before = {rank: _size(path) for rank, path in paths.items()}
    for rank in paths:
        signal_to(rank)
    end_s = time.monotonic() + STACKS_S
    sizes: dict[int, int] = {}
    # faulthandler writes in many pieces: the text is complete when it ends with a line and no longer grows.
    while (now := {rank: _size(path) for rank, path in paths.items()}) != sizes or any(
        now[rank] == before[rank] or not path.read_bytes().endswith(b"\n") for rank, path in paths.items()
    ):
        if time.monotonic() > end_s:
            break
        sizes = now
        time.sleep(_PAUSE_S)
    texts = {rank: path.read_text()[before[rank] :] for rank, path in paths.items() if path.exists()}
    return {rank: text for rank, text in texts.items() if text}


def is_in_collective(stacks: str) -> bool:
    """Whether a thread is inside a collective, so that the rank waits for others."""
    return _COLLECTIVE.search(stacks) is not None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
