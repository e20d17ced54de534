"""Memory of an encoding job does not grow with its input: every process, for 10,000 and 100,000 images."""

import io
import os
import subprocess
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.encoding import clean_environment, job_command
from tests.support.speed import scaled
from tests.support.tiny_vae import save_tiny_vae

pytestmark = pytest.mark.pipeline

NUMBERS = (10_000, 100_000)
NUM_CLASSES = 100
SLOPES = {"driver": 350, "object store": 50}
"""Allowed growth of the peak, in bytes per image; 350 is 450 MB for the 1.28 million images of ImageNet."""
OTHER_SLOPE = 150
"""Allowed growth of any other process: a few MB of noise, and Ray's task records."""


class Peaks:
    """Peak private memory of each kind of marked process, and of Ray's object store."""

    def __init__(self, mark: str) -> None:
        self.bytes: dict[str, int] = {}
        self._mark = mark.encode()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Peaks":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if self._mark in (folder / "environ").read_bytes():
                        self._look(folder)
                except OSError:  # ended since
                    continue

    def _look(self, folder: Path) -> None:
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        if "RssAnon" in status:  # else a zombie
            self._note(kind_of(command), 1024 * int(status["RssAnon"].split()[0]))
        if "raylet/raylet" in command:
            for link in (folder / "fd").iterdir():
                if "plasma" in os.readlink(link) and "/shm/" in os.readlink(link):
                    self._note("object store", 512 * link.stat().st_blocks)

    def _note(self, kind: str, size: int) -> None:
        self.bytes[kind] = max(size, self.bytes.get(kind, 0))


def kind_of(command: str) -> str:
    if "encode_latents.py" in command:
        return "driver"
    if command.startswith("ray::"):
        return "encoder" if "Encoder" in command or "encode " in command else "worker"
    for name in ("raylet/raylet", "gcs_server", "runtime_env", "dashboard", "log_monitor"):
        if name in command:
            return name
    return "other"


def write_images(folder: Path, number: int) -> None:
    """Write tiny PNGs, a hundred different ones."""
    draws = np.random.default_rng(0)
    pictures = []
    for _ in range(100):
        stream = io.BytesIO()
        Image.fromarray(draws.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(stream, "PNG")
        pictures.append(stream.getvalue())
    for label in range(NUM_CLASSES):
        (folder / f"n{label:08d}").mkdir(parents=True)
    for index in range(number):
        label = index % NUM_CLASSES
        (folder / f"n{label:08d}/n{label:08d}_{index}.JPEG").write_bytes(pictures[index % 100])


def run(folder: Path, number: int, vae: str) -> dict[str, int]:
    """Run a complete job and return the peaks in bytes."""
    write_images(folder / "images", number)
    mark = f"dit-scale-memory-{uuid.uuid4().hex}"
    command = job_command(f"source={folder}/images", f"output={folder}/out", f"vae={vae}", "image_size=16")
    command += ["vae_batch=250", "shard_samples=2500", "cpus_per_encoder=0.5", "encoders=1", "decoders=2"]
    begin_s = time.monotonic()
    with Peaks(mark) as peaks:
        environment = clean_environment(DIT_SCALE_TEST=mark)
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=scaled(500.0))
    assert ran.returncode == 0, ran.stderr
    assert f"{number} samples of {NUM_CLASSES} classes in {number // 2500} shards" in ran.stdout
    print(f"{number} images in {time.monotonic() - begin_s:.0f} s")
    return peaks.bytes


@pytest.mark.long
def test_no_process_grows_with_the_input(tmp_path: Path) -> None:
    vae = save_tiny_vae(tmp_path / "vae")
    few, many = (run(tmp_path / str(number), number, vae) for number in NUMBERS)
    assert {"driver", "encoder", "worker", "raylet/raylet", "gcs_server", "object store"} <= many.keys()
    print(f"{'peak, MB':16} {NUMBERS[0]:>9} {NUMBERS[1]:>9}  bytes per further image")
    slopes = {}
    for kind in sorted(many):
        slopes[kind] = (many[kind] - few.get(kind, 0)) / (NUMBERS[1] - NUMBERS[0])
        print(f"{kind:16} {few.get(kind, 0) / 1e6:9.1f} {many[kind] / 1e6:9.1f} {slopes[kind]:8.0f}")
    assert {kind: slope for kind, slope in slopes.items() if slope > SLOPES.get(kind, OTHER_SLOPE)} == {}
