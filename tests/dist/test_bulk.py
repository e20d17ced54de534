"""Sampling in bulk by real processes: any number of them, any batch, killed at any moment: the same bytes."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dit_scale import cli
from dit_scale.sampling.npz_files import read_images, read_labels
from dit_scale.sampling.sample_folder import SampleFolder
from tests.support.faults.small_disk import fill, small_disk
from tests.support.sampling import POINTS, start, wait_until
from tests.support.tiny_run import write_run
from tests.support.tiny_vae import save_tiny_vae

NUM_IMAGES, TILE = 90, 2
KILLS = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bulk")
    write_run(folder / "run", save_tiny_vae(folder / "vae"))
    return folder / "run"


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of one process in one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "samples"
    assert cli.main(["sample", *arguments(run, out)]) == 0
    return out


def arguments(run: Path, out: Path, batch: int = 1) -> list[str]:
    sizes = ["--images", str(NUM_IMAGES), "--tile", str(TILE), "--batch", str(batch)]
    return [str(run), *sizes, "--steps", "3", "--guidance", "2", "--device", "cpu", "--out", str(out)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def committed(out: Path) -> list[Path]:
    return list((out / "parts").glob("[0-9]*.npz"))


@pytest.mark.parametrize(("world", "batch"), [(1, 7), (2, 1), (3, 5)])
def test_processes_and_batches_change_no_byte(
    run: Path, whole: Path, tmp_path: Path, world: int, batch: int
) -> None:
    out = tmp_path / "out"
    said = start(arguments(run, out, batch), tmp_path / "log", world).finish()
    assert contents(out) == contents(whole)
    assert f"{NUM_IMAGES} images in {out}/grid.png and {out}/samples.npz" in said
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        assert len({image.tobytes() for image in file["arr_0"]}) == NUM_IMAGES


def changed(folder: Path, times: int) -> Callable[[], bool]:
    """Return a question: have the names in the folder changed so many times?"""
    seen: list[frozenset[str]] = []

    def has_changed() -> bool:
        now = frozenset(name for _, _, names in os.walk(folder) for name in names)
        if not seen or seen[-1] != now:
            seen.append(now)
        return len(seen) > times

    return has_changed


def test_killed_at_ten_random_moments(run: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL after a random number of changes in the folder, with 1, 2 or 3 processes and other batches."""
    draws, kept, out = random.Random(0), [0], tmp_path / "out"
    for number in range(KILLS):
        request = arguments(run, out, batch=draws.choice([1, 2, 3, 4]))
        workers = start(request, tmp_path / "log", world=1 + number % 3)
        wait_until(changed(out, times=draws.randint(1, 6)), workers)
        workers.kill()
        kept.append(len(committed(out)))
        assert not (out / "samples.json").exists(), "finished before the last kill"
    assert kept == sorted(kept), "a committed part was lost"
    assert 2 < kept[-1] < NUM_IMAGES // TILE
    start(arguments(run, out), tmp_path / "log", world=2).finish()
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(run: Path, whole: Path, tmp_path: Path, point: str) -> None:
    out, reached = tmp_path / "out", tmp_path / "reached"
    if "part" not in point:
        all_in_one_part(whole, out)
    workers = start(arguments(run, out), tmp_path / "log", hold=(point, reached))
    wait_until(reached.exists, workers)
    workers.kill()
    assert cli.main(["sample", *arguments(run, out)]) == 0
    assert contents(out) == contents(whole)


def all_in_one_part(whole: Path, out: Path) -> None:
    """Make a folder in which all images are committed, and only the assembly is left."""
    out.mkdir()
    shutil.copy(whole / "protocol.json", out)
    protocol = json.loads((out / "protocol.json").read_text())
    del protocol["sha256"]
    (images_NHW3,) = read_images(whole / "samples.npz", NUM_IMAGES)
    SampleFolder(out, protocol).commit(0, images_NHW3, read_labels(whole / "samples.npz"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_only_committed_parts(
    run: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    workers = start(arguments(run, out), tmp_path / "log")
    wait_until(lambda: len(committed(out)) > 0, workers)
    os.kill(workers.processes[0].pid, number)
    assert workers.codes() == [130], workers.said()
    assert f"{out} keeps the images that are committed; the same command resumes" in workers.said()
    assert set(committed(out)) == set((out / "parts").iterdir())
    assert cli.main(["sample", *arguments(run, out, batch=9)]) == 0
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(("room_kib", "num_parts"), [(120, None), (480, 45)])
def test_a_full_disk_costs_nothing_that_is_committed(
    run: Path,
    whole: Path,
    tmp_path: Path,
    room_kib: int,
    num_parts: int | None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With room for some parts of 8 KiB, or for all of them but not for samples.npz (272 KiB) beside them."""
    with small_disk(tmp_path / "disk", 4 * 2**20) as disk:
        out, filler = disk / "out", fill(disk)
        os.truncate(filler, filler.stat().st_size - room_kib * 1024)
        assert cli.main(["sample", *arguments(run, out)]) == 2
        said = capfd.readouterr().err
        assert f"dit-scale sample: cannot write {out}/" in said
        assert "No space left on device; free some space, data already written is intact" in said
        assert list(out.rglob(".*")) == []
        assert len(committed(out)) == num_parts or (num_parts is None and 5 < len(committed(out)) < 15)
        filler.unlink()
        assert cli.main(["sample", *arguments(run, out)]) == 0
        assert contents(out) == contents(whole)
