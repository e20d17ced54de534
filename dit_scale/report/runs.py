"""The runs below a folder and the status of each, without asking any server. No torch."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dit_scale.errors import DitScaleError
from dit_scale.report.status import Status, status_of
from dit_scale.train.run_folder import EVENTS

MAX_DEPTH = 4
"""How deep below the folder runs are looked for."""


@dataclass(frozen=True)
class Listing:
    """The runs below a folder."""

    runs: list[Status]
    """Sorted by their last write, newest first."""
    problems: dict[str, str]
    """Run folder, or another folder => why it cannot be read."""


def list_runs(folder: str, now_s: float) -> Listing:
    """Return the runs in `folder` and below, at `now_s` in seconds since 1970."""
    problems: dict[str, str] = {}

    def note(error: OSError) -> None:
        problems[str(error.filename)] = error.strerror or str(error)

    runs: list[Status] = []
    for path in find_runs(Path(folder), note):
        try:
            runs.append(status_of(str(path), now_s, remote=False))
        except DitScaleError as error:
            problems[str(path)] = str(error)
        except OSError as error:
            note(error)
    return Listing(sorted(runs, key=lambda status: (status.silence_s, status.run)), problems)


def find_runs(folder: Path, on_error: Callable[[OSError], None]) -> list[Path]:
    """Return the run folders in `folder` and up to MAX_DEPTH below, by name; a run contains no other run.

    Links are followed; a run that has several names is returned once.
    """
    found: dict[str, Path] = {}
    for at, names, files in os.walk(folder, onerror=on_error, followlinks=True):
        path = Path(at)
        if EVENTS in files or any((path / "supervisors").glob("*.jsonl")):
            found.setdefault(os.path.realpath(path), path)
            names.clear()
        elif len(path.relative_to(folder).parts) == MAX_DEPTH:
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))
    return list(found.values())
