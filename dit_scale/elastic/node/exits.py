"""How a process of a run ends: exit codes, and the verdict that a rank leaves in a file.

Launchers flatten exit codes, and ranks survive a killed launcher. Only a rank's own verdict tells how it
ended.
"""

import json
import os
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from dit_scale.errors import ConfigError, StabilityError, WeightsError


class Exit(IntEnum):
    """Exit codes of a supervisor and of its ranks."""

    DONE = 0
    """The last step is committed."""
    FAILED = 1
    """Any other failure: a scheduler may try again."""
    REQUEUE = 75
    """Stopped on request with everything committed: the job can be queued again."""
    DO_NOT_RESTART = 93
    """A restart would fail the same way: manual intervention needed, as the message explains."""


PERMANENT = (ConfigError, WeightsError, StabilityError)
"""Errors that a restart would meet again. Others may be transient: data, storage, devices."""


def exit_code(error: BaseException) -> Exit:
    """Return the exit code for an error, which tells whether a restart can help."""
    return Exit.DO_NOT_RESTART if isinstance(error, PERMANENT) else Exit.FAILED


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a rank ended, as recorded by itself."""

    rank: int
    code: int
    step: int
    """Steps taken."""
    error: str = ""
    """Class of the exception; empty when there was none."""
    message: str = ""
    phase: str = ""
    """Name of its last phase; empty when it has sent no heartbeat. The file calls it `section`."""
    second_hand: bool = False
    """Whether the error only says that another rank does not respond."""


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """Write a verdict atomically."""
    path = _path(folder, verdict.rank)
    tree = asdict(verdict)
    tree["section"] = tree.pop("phase")
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(tree))
    os.replace(tmp, path)


def read_verdict(folder: Path, rank: int) -> Verdict | None:
    """Return the verdict of a rank, or None while there is none."""
    try:
        tree = json.loads(_path(folder, rank).read_text())
    except FileNotFoundError:
        return None
    return Verdict(**{"phase" if key == "section" else key: value for key, value in tree.items()})


def _path(folder: Path, rank: int) -> Path:
    return folder / f"verdict-{rank:05d}.json"
