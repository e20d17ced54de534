"""Sampling in bulk by real processes: any number of them, any batch, killed at any moment: the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dit_scale import cli
from tests.support.faults.small_disk import fill, small_disk
from tests.support.held_sample import POINTS
from tests.support.speed import scaled
from tests.support.tiny_run import write_run
from tests.support.tiny_vae import save_tiny_vae

NUM_IMAGES, TILE = 90, 2
KILLS = 10
LIMIT_S = scaled(300.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bulk")
    write_run(folder / "run", save_tiny_vae(folder / "vae"))
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one process in one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "samples"
    finish(start(run, out, world=1))
    return contents(out)


def arguments(run: Path, out: Path, batch: int = 1) -> list[str]:
    sizes = ["--images", str(NUM_IMAGES), "--tile", str(TILE), "--batch", str(batch)]
    return [str(run), *sizes, "--steps", "4", "--guidance", "2", "--device", "cpu", "--out", str(out)]


def start(
    run: Path,
    out: Path,
    world: int,
    batch: int = 1,
    module: Sequence[str] = ("dit_scale.cli", "sample"),
) -> list[subprocess.Popen[str]]:
    """Start the workers as a launcher does."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", *module, *arguments(run, out, batch)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def finish(workers: list[subprocess.Popen[str]]) -> str:
    """Wait for all workers; return what they said."""
    said = [worker.communicate(timeout=LIMIT_S)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers), "\n".join(said)
    return "\n".join(said)


def kill(workers: list[subprocess.Popen[str]]) -> None:
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
    for worker in workers:
        worker.communicate()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> frozenset[str]:
    return frozenset(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(("world", "batch"), [(2, 1), (3, 5)])
def test_processes_and_batches_change_no_byte(
    run: Path, undisturbed: dict[str, bytes], tmp_path: Path, world: int, batch: int
) -> None:
    said = finish(start(run, tmp_path, world, batch))
    assert contents(tmp_path) == undisturbed
    assert f"{NUM_IMAGES} images in {tmp_path}/grid.png and {tmp_path}/samples.npz" in said
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert len({image.tobytes() for image in file["arr_0"]}) == NUM_IMAGES


def test_killed_at_ten_moments(run: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """SIGKILL after a random number of changes in the folder, with another number of processes each time."""
    draws = random.Random(0)
    kept = []
    for number in range(KILLS):
        workers = start(run, tmp_path, world=1 + number % 3, batch=draws.choice([1, 2, 3, 4]))
        seen, changes, until = names(tmp_path), draws.randint(1, 7), time.monotonic() + LIMIT_S
        while changes:
            assert time.monotonic() < until
            assert any(worker.poll() is None for worker in workers), "finished before the last kill"
            now = names(tmp_path)
            changes, seen = changes - (now != seen), now
        kill(workers)
        kept.append(len(list((tmp_path / "parts").glob("[0-9]*.npz"))))
    assert kept == sorted(kept), "a committed part was lost"
    assert kept[0] < kept[-1]
    assert not (tmp_path / "samples.json").exists()
    finish(start(run, tmp_path, world=2))
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(run: Path, undisturbed: dict[str, bytes], tmp_path: Path, point: str) -> None:
    out, reached = tmp_path / "out", tmp_path / "reached"
    if "part" not in point:  # only the assembly is left
        finish(start(run, out, world=1))
        spread_again(out)
    module = ("tests.support.held_sample", point, str(reached), "--")
    workers = start(run, out, world=1, module=module)
    until = time.monotonic() + LIMIT_S
    while not reached.exists():
        assert time.monotonic() < until
        assert workers[0].poll() is None, workers[0].communicate()[0]
        time.sleep(0.01)
    kill(workers)
    finish(start(run, out, world=1))
    assert contents(out) == undisturbed


def spread_again(out: Path) -> None:
    """Turn a finished folder back into one whose images are all committed as one part."""
    import json

    from dit_scale.sampling.npz_files import read_images, read_labels
    from dit_scale.sampling.sample_folder import SampleFolder

    protocol = json.loads((out / "protocol.json").read_text())
    del protocol["sha256"]
    (images_NHW3,) = read_images(out / "samples.npz", NUM_IMAGES)
    SampleFolder(out, protocol).commit(0, images_NHW3, read_labels(out / "samples.npz"))
    for name in ("samples.npz", "samples.json", "grid.png"):
        (out / name).unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_only_committed_parts(
    run: Path, undisturbed: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    workers = start(run, tmp_path, world=1)
    until = time.monotonic() + LIMIT_S
    while not list((tmp_path / "parts").glob("[0-9]*")):
        assert time.monotonic() < until
        assert workers[0].poll() is None
    workers[0].send_signal(number)
    said = workers[0].communicate(timeout=LIMIT_S)[0]
    assert workers[0].returncode == 130, said
    assert f"{tmp_path} keeps the images that are committed; the same command resumes" in said
    left = {path.name[0] for path in (tmp_path / "parts").iterdir()}
    assert left == {"0"}
    finish(start(run, tmp_path, world=1, batch=9))
    assert contents(tmp_path) == undisturbed


@contextmanager
def disk_of(folder: Path, size_bytes: int) -> Iterator[Path]:
    with small_disk(folder, size_bytes) as disk:
        yield disk


@pytest.mark.parametrize("images_that_fit", [30, 130])
def test_a_full_disk_costs_nothing_that_is_committed(
    run: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    images_that_fit: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With room for some parts, or for all parts but not for samples.npz beside them."""
    with disk_of(tmp_path / "disk", 4 * 2**20) as disk:
        filler = fill(disk)
        os.truncate(filler, filler.stat().st_size - images_that_fit * 32 * 32 * 3 - 64 * 1024)
        out = disk / "out"
        assert cli.main(["sample", *arguments(run, out)]) == 2
        said = capfd.readouterr().err
        assert f"dit-scale sample: cannot write {out}/" in said
        assert "No space left on device; free some space, data already written is intact" in said
        assert [path.name for path in out.rglob(".*")] == []
        committed = len(list((out / "parts").glob("[0-9]*")))
        filler.unlink()
        assert committed > 5
        assert cli.main(["sample", *arguments(run, out)]) == 0
        assert contents(out) == undisturbed
