"""Under which id a run appears in other programs: the same in every attempt."""

import hashlib
import os
import re
from pathlib import Path

_WANDB_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")
"""Name of a wandb folder: the time when it was created, and the id of the run."""


def run_id(folder: Path) -> str:
    """Return the id of the run in this folder, even if W&B knows it by an earlier place; else a new one."""
    known = (_WANDB_FOLDER.fullmatch(path.name) for path in (folder / "wandb").glob("*run-*"))
    if created := sorted(match.groups() for match in known if match):
        return str(created[-1][1])
    return id_of(os.path.abspath(folder))


def id_of(place: str) -> str:
    """Return a unique id for this path or URL."""
    digest = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_.]+", "-", place).strip("-")[-100:] + f"-{digest}"
