"""`dit-scale latents verify --grid`: samples next to their source images, located by the listing."""

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from demo import digits
from dit_scale import cli, vae
from dit_scale.config import EncodeConfig
from dit_scale.data.pixels import center_crop, to_array
from dit_scale.data.shards import LatentDataset
from dit_scale.inference.preview import decode, random_ids
from dit_scale.storage import open_storage
from dit_scale_pipeline import output
from dit_scale_pipeline.compare import psnr
from dit_scale_pipeline.decoder import read_batch
from dit_scale_pipeline.encoder import Encoder
from dit_scale_pipeline.inputs.saved import save_listing
from dit_scale_pipeline.job import make_plan
from dit_scale_pipeline.shards_writer import write_shard
from tests.support.latents import edit_info
from tests.support.tiny_vae import save_tiny_vae

VAE = str(Path(__file__).parents[2] / "demo" / "vae")
SIDE = 64
NUM_DIGITS = 8
"""Two of each class from 0 to 3; a damaged file sorts first, so keys differ from sample ids."""


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Restore the number of threads, which an encoder sets for its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def write_digits(folder: Path) -> None:
    pixels_N88, labels_N, paths = digits.load()
    for label in range(4):
        for row in np.flatnonzero(labels_N == label)[:2]:
            (folder / paths[row]).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_N88[row]).save(folder / paths[row])
    (folder / "0" / "-damaged.png").write_bytes(b"no picture")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of digits, `images`, and their latents, `set`, encoded like in the job."""
    folder = tmp_path_factory.mktemp("encoded")
    write_digits(folder / "images")
    config = EncodeConfig(
        source=str(folder / "images"), output=str(folder / "set"), vae=VAE, image_size=SIDE, shard_samples=5
    )
    storage, plan = open_storage(folder / "set"), make_plan(config, None, Console(quiet=True))
    encoder = Encoder(config, plan.vae, "cpu")
    records = []
    for name, rows in plan.shards.items():
        pixels, account = read_batch(config.source, plan.listing.kind, plan.listing.entries(rows), SIDE)
        moments = encoder.encode(pixels, encoder.runtime())
        records.append(write_shard(config.output, name, [account], plan.vae.latent_channels, moments))
    save_listing(storage, plan.listing)
    identity = {**plan.identity, **encoder.runtime()}
    output.commit(storage, config, plan.listing, vae=plan.vae, stored=identity, records=records)
    return folder


@pytest.fixture
def moved(encoded: Path, tmp_path: Path) -> Path:
    """A copy of `encoded`; its dataset.json still refers to the original images."""
    return Path(shutil.copytree(encoded, tmp_path / "moved"))


def verify(folder: Path, *more: str) -> int:
    return cli.main(["latents", "verify", str(folder / "set"), "--vae", VAE, "--device", "cpu", *more])


def test_samples_beside_their_images(
    encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.png"
    assert verify(encoded, "--grid", str(out), "--images", "4", "--seed", "2") == 0
    intact, _, _, _, *lines, _, last = capsys.readouterr().out.splitlines()
    assert intact == "sound: 8 samples in 2 shards, 4 classes, 1 of 9 inputs quarantined"
    dataset, decoder = LatentDataset.open(encoded / "set"), vae.load(VAE)
    paths = sorted(path for path in (encoded / "images").rglob("*.png") if path.name != "-damaged.png")
    ids, found = random_ids(NUM_DIGITS, 4, 2), []
    with Image.open(out) as file:
        grid = np.asarray(file)
    # samples in two rows of two; 64 pixels and two of white for each of three pictures, two in between
    for place, (sample_id, line) in enumerate(zip(ids, lines, strict=True)):
        label, path = sample_id // 2, paths[sample_id].relative_to(encoded / "images")
        with Image.open(paths[sample_id]) as file:
            crop = to_array(center_crop(file.convert("RGB"), SIDE))
        views = decode(dataset, decoder, sample_id)[0]
        top, left = 2 + place // 2 * 66, 2 + place % 2 * 200
        for column, picture in enumerate((crop, *views)):
            start = left + column * 66
            assert np.array_equal(grid[top : top + SIDE, start : start + SIDE], picture)
        found.append(psnr(crop, views[0]))
        assert line.split() == ([str(sample_id), str(label), str(label), str(path), f"{found[-1]:.1f}"])
    assert min(found) > 30
    assert last == f"4 samples, median PSNR {np.median(found):.1f} dB; crop | image | mirror -> {out}"


def test_images_that_were_moved(moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "grid.png")
    source = LatentDataset.open(moved / "set").info.source.model_dump()
    edit_info(moved / "set", source=source | {"uri": "/gone"})
    assert verify(moved, "--grid", out) == 2
    error = capsys.readouterr().err
    assert f"cannot list the images of {moved}/set at /gone; if they have moved, pass --source" in error
    assert verify(moved, "--grid", out, "--source", str(moved / "images")) == 0
    assert re.search(r"8 samples, median PSNR \d\d\.\d dB", capsys.readouterr().out)


def test_a_source_that_has_changed_is_not_compared(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, images = tmp_path / "grid.png", moved / "images"
    grid = ("--grid", str(out), "--source", str(images))
    path = next((images / "3").iterdir())
    path.rename(images / "3" / "other.png")
    assert verify(moved, *grid) == 2
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1, "what is sound is said before"
    assert "the source has changed, nothing was compared" in printed.err
    assert f"1 new (3/other.png) and 1 missing (3/{path.name})" in printed.err
    (images / "3" / "other.png").rename(path)
    (images / "2x").mkdir()  # an empty class changes no path, but the class numbers behind it
    assert verify(moved, *grid) == 2
    assert "lists 9 images of 5 classes" in capsys.readouterr().err
    (images / "2x").rmdir()
    assert verify(moved, *grid) == 0
    assert out.exists()


def test_other_images_under_the_same_names_show(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (next((moved / "images" / name).iterdir()) for name in ("1", "3"))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    grid = ("--grid", str(tmp_path / "grid.png"), "--source", str(moved / "images"))
    assert verify(moved, *grid) == 0
    found = re.findall(r"(\d/\S+) +(\d+\.\d) *$", capsys.readouterr().out, re.MULTILINE)
    low = {path for path, psnr_db in found if float(psnr_db) < 20}
    assert low == {f"1/{one.name}", f"3/{other.name}"}
    one.write_bytes(b"no picture")
    assert verify(moved, *grid) == 2
    assert re.search(
        rf"1/{one.name}, the source of sample [23], can no longer be decoded: not an im",
        capsys.readouterr().err,
    )


def test_another_vae_is_refused(encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_tiny_vae(tmp_path / "other")
    assert verify(encoded, "--grid", str(tmp_path / "grid.png"), "--vae", other) == 2
    assert "did not make the latents" in capsys.readouterr().err


def test_a_damaged_data_set_is_not_shown(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (moved / "set/shards/00001.idx").unlink()
    assert verify(moved, "--grid", str(tmp_path / "grid.png")) == 1
    assert "damaged: cannot read" in capsys.readouterr().err
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("argument", ["--threads=0", "--images=0", "--images=101", "--threads=many"])
def test_numbers_out_of_range(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["latents", "verify", "set", argument])
    assert "expected an integer from 1 to" in capsys.readouterr().err


def test_psnr() -> None:
    black = np.zeros((2, 2, 3), np.uint8)
    assert psnr(black, black + 1) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(black, black + 255) == 0
    assert psnr(black, black) == math.inf
