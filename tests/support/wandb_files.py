"""Files of W&B, as its own program reads them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.speed import scaled


def records_of(file: Path) -> dict[str, list[Any]]:
    """Return the records of a .wandb file by their type."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=scaled(400.0))
    found: dict[str, list[Any]] = {}
    for record in map(json.loads, done.stdout.splitlines()):
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found
