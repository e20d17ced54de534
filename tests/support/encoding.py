"""What tests of the encoding job share: images, environment, command line, and the objects of an output."""

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dit_scale.storage import Storage, open_storage
from dit_scale_pipeline.metrics import METRICS_KEY

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "data_pipeline/encode_latents.py"


def clean_environment(**changes: str) -> dict[str, str]:
    """Return the environment of this process without Ray addresses and S3 credentials."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    # a submitted job's `python` is looked up by the head
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"} | changes


def job_command(*arguments: str | Path) -> list[str]:
    """Return the command line of a job."""
    return [sys.executable, str(ROOT / SCRIPT), *map(str, arguments)]


def write_images(folder: Path, number: int, classes: int = 3) -> None:
    """Write smooth noise of odd sizes, alternating PNG and JPEG, in class folders n0, n1, ..."""
    draws = np.random.default_rng(0)
    for index in range(number):
        path = folder / f"n{index % classes}/{index:03d}.{('png', 'JPEG')[index % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = (int(side) for side in draws.integers(20, 120, 2))
        noise = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        noise.resize((width, height)).save(path)


def objects(where: Storage | str | Path) -> dict[str, bytes]:
    """Return all objects of an output except its metrics, which depend on time."""
    storage = where if isinstance(where, Storage) else open_storage(where)
    return {key: storage.read(key) for key, _ in storage.list() if key != METRICS_KEY}
