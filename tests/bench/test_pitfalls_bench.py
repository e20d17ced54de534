"""The benchmark of pitfalls runs on a tiny model and measures each of them."""

import subprocess
import sys
from pathlib import Path

from tests.support.scored_images import random_images, write_folder
from tests.support.tiny_run import write_run
from tests.support.tiny_vae import save_tiny_vae

ROOT = Path(__file__).parents[2]


def test_each_pitfall_has_a_row(tmp_path: Path) -> None:
    write_run(tmp_path / "run", save_tiny_vae(tmp_path / "vae"))
    real = write_folder(random_images(80, size=32), tmp_path / "real")
    command = [sys.executable, "-m", "benchmarks.pitfalls", str(tmp_path / "run"), "--real", str(real)]
    options = [
        "--network",
        f"classifier:{ROOT}/demo/classifier.safetensors",
        "--images",
        "80",
        "--steps",
        "3",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True, cwd=ROOT)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 5]
    names = [row[1].strip() for row in rows[2:]]
    assert names == [
        "the protocol",
        "rounding (x + 1) / 2 * 255",
        "labels balanced",
        "guidance on all channels",
        "half of the samples",
        "a quarter of the samples",
        "IS over 10 splits, drawn order",
        "IS over 10 splits, sorted by class",
        "real images, both resized with antialias",
        "real images, one half without antialias",
    ]
    counts = [int(row[2]) for row in rows[2:]]
    assert counts == [80, 80, 80, 80, 40, 20, 80, 80, 40, 40]
    assert rows[2][3] != rows[3][3]
