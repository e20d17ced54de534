"""How a process of a run ends: exit codes, and the verdict that a rank leaves in a file.

Launchers flatten exit codes, and ranks outlive one that is killed, so nothing is believed that is not in a
rank's own verdict.
"""

import json
import os
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from dit_scale.errors import ConfigError, StabilityError, WeightsError


class Exit(IntEnum):
    """Exit codes of a supervisor, and what the verdicts of its ranks come to."""

    DONE = 0
    """The last step is committed."""
    FAILED = 1
    """Anything else: a scheduler may try again."""
    REQUEUE = 75
    """Stopped on request, all is committed: put me back in the queue."""
    DO_NOT_RESTART = 93
    """Another start would end the same way; a person must mend something, the message says what."""


HOPELESS = (ConfigError, WeightsError, StabilityError)
"""Errors that another start would meet again. Others may pass: data, storage, devices."""


def exit_code(error: BaseException) -> Exit:
    """What an error means for those who would start the run again."""
    return Exit.DO_NOT_RESTART if isinstance(error, HOPELESS) else Exit.FAILED


@dataclass(frozen=True)
class Verdict:
    """How a rank ended, in its own words."""

    rank: int
    code: int
    step: int
    """Steps taken."""
    error: str = ""
    """Class of the exception; empty when there was none."""
    message: str = ""
    section: str = ""
    """Name of what it was doing (`heartbeat.Section`)."""
    second_hand: bool = False
    """The error only says that another rank does not answer."""


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """Leave a verdict, whole or not at all."""
    path = _path(folder, verdict.rank)
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(asdict(verdict)))
    os.replace(tmp, path)


def read_verdict(folder: Path, rank: int) -> Verdict | None:
    """The verdict of a rank; None while there is none."""
    try:
        return Verdict(**json.loads(_path(folder, rank).read_text()))
    except FileNotFoundError:
        return None


def _path(folder: Path, rank: int) -> Path:
    return folder / f"verdict-{rank:05d}.json"
