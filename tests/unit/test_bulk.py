"""Sampling in bulk, in one process: shares, resuming, protocols, damage, files."""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit_scale.config import EngineConfig
from dit_scale.errors import ConfigError, DataError, StorageError, WeightsError
from dit_scale.inference import bulk
from dit_scale.inference.bulk import SampleRequest, Worker, sample_images
from dit_scale.inference.sources import open_source
from dit_scale.sampling import assembly
from dit_scale.sampling.labels import LabelChoice
from dit_scale.sampling.sample_folder import SampleFolder, read_mark
from dit_scale.sampling.settings import SamplingSettings
from tests.support.tiny_run import write_run
from tests.support.tiny_vae import save_tiny_vae

NUM_IMAGES, TILE = 11, 2


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory, tiny_vae: str) -> SampleRequest:
    run = tmp_path_factory.mktemp("run")
    write_run(run, tiny_vae)
    return SampleRequest(
        source=open_source(str(run)),
        vae=tiny_vae,
        num_images=NUM_IMAGES,
        labels=LabelChoice(),
        settings=SamplingSettings(seed=3, steps="2", guidance=2.0, tile=TILE),
        engine=EngineConfig(device="cpu", precision="fp32"),
    )


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(request_: SampleRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of one worker in one go."""
    out = tmp_path_factory.mktemp("whole") / "samples"
    assert sample_images(request_, out) == out
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def parts(folder: Path) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in (folder / "parts").glob("*.npz"))


def stop_after(monkeypatch: pytest.MonkeyPatch, num_tiles: int) -> None:
    """Interrupt the process when it begins with one more tile."""
    real, count = bulk.sample_tile, iter(range(1000))

    def sample_tile(*args: Any, **named: Any) -> torch.Tensor:
        if next(count) == num_tiles:
            raise KeyboardInterrupt
        return real(*args, **named)

    monkeypatch.setattr(bulk, "sample_tile", sample_tile)


def test_files(whole: Path, request_: SampleRequest) -> None:
    assert sorted(contents(whole)) == ["grid.png", "protocol.json", "samples.json", "samples.npz"]
    with np.load(whole / "samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.shape, images.dtype) == ((NUM_IMAGES, 32, 32, 3), np.uint8)
    assert labels.tolist() == LabelChoice().labels(NUM_IMAGES, 5, seed=3).tolist()
    assert len(np.unique(images)) > 10
    assert len({image.tobytes() for image in images}) == NUM_IMAGES
    with Image.open(whole / "grid.png") as grid:
        assert np.array_equal(np.asarray(grid)[36:68, 2 + 34 : 34 + 34], images[5])
    mark = read_mark(whole)
    assert mark is not None
    assert mark["files"]["samples.npz"]["bytes"] == (whole / "samples.npz").stat().st_size
    assert not torch.distributed.is_initialized()


def test_the_protocol_says_what_pixels_depend_on(whole: Path, request_: SampleRequest) -> None:
    protocol = json.loads((whole / "protocol.json").read_text())
    assert (protocol["format"], protocol["version"]) == ("dit-scale samples", 1)
    assert (protocol["images"], protocol["image_size"]) == (NUM_IMAGES, 32)
    assert protocol["weights"]["description"] == request_.source.description
    assert (protocol["weights"]["ema"], protocol["weights"]["step"]) == ("first", 40)
    assert len(protocol["weights"]["sha256"]) == 64
    assert protocol["labels"] == {"drawn": "random", "classes": None}
    assert protocol["sampling"]["steps"] == "2"
    assert protocol["sampling"]["tile"] == TILE
    assert protocol["vae"]["weights_sha256"] == request_.source.vae_sha256
    assert protocol["precision"] == "fp32"
    assert protocol["device"].startswith("cpu ")
    assert set(protocol["versions"]) == {"dit_scale", "torch", "diffusers"}


@pytest.mark.parametrize(("count", "batch"), [(1, 4), (2, None), (2, 5), (3, 1), (3, 4), (2, 100), (7, None)])
def test_shares_and_batches_change_no_byte(
    whole: Path, request_: SampleRequest, tmp_path: Path, count: int, batch: int | None
) -> None:
    request_ = replace(request_, batch=batch)
    ended = [sample_images(request_, tmp_path, Worker(index, count)) for index in range(count)]
    assert ended[-1] == tmp_path or count > 1
    assert contents(tmp_path) == contents(whole)


def test_only_the_last_worker_assembles(request_: SampleRequest, tmp_path: Path) -> None:
    assert sample_images(request_, tmp_path, Worker(1, 3)) is None
    assert parts(tmp_path) == ["00000002-00000004", "00000008-00000010"]
    assert sample_images(request_, tmp_path, Worker(2, 3)) is None
    assert not (tmp_path / "samples.npz").exists()
    assert sample_images(request_, tmp_path, Worker(0, 3)) == tmp_path


def test_a_batch_is_one_part(request_: SampleRequest, tmp_path: Path) -> None:
    assert sample_images(replace(request_, batch=3), tmp_path, Worker(1, 2)) is None
    assert parts(tmp_path) == ["00000004-00000008"]


@pytest.mark.parametrize(("tiles", "batch"), [(0, 1), (1, 1), (5, 1), (1, 4), (5, 4)])
def test_an_interrupted_worker_keeps_what_is_committed(
    whole: Path,
    request_: SampleRequest,
    tmp_path: Path,
    tiles: int,
    batch: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, tiles)
        with pytest.raises(KeyboardInterrupt):
            sample_images(replace(request_, batch=batch), tmp_path)
    kept = len(parts(tmp_path)) if (tmp_path / "parts").is_dir() else 0
    assert kept == tiles * TILE // max(batch, TILE)
    drawn: list[range] = []
    real = bulk.sample_tile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bulk, "sample_tile", lambda *args, **named: drawn.append(named["images"]) or real(*args, **named)
        )
        assert sample_images(replace(request_, batch=6), tmp_path) == tmp_path
    assert len(drawn) == 6 - kept * max(batch // TILE, 1)
    assert contents(tmp_path) == contents(whole)


def test_a_finished_folder_is_left_alone(whole: Path, request_: SampleRequest) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(bulk, "build_model")
        assert sample_images(request_, whole, Worker(2, 3)) == whole
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_parts_left_after_the_mark_are_deleted(whole: Path, request_: SampleRequest, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleFolder, "discard_parts", lambda folder: None)
        sample_images(request_, tmp_path)
    (tmp_path / "parts" / ".00000000-00000002.npz.1234.tmp").touch()
    assert parts(tmp_path)
    assert sample_images(request_, tmp_path) == tmp_path
    assert contents(tmp_path) == contents(whole)
    assert not (tmp_path / "parts").exists()


def test_what_a_killed_assembler_left_is_deleted(
    whole: Path, request_: SampleRequest, tmp_path: Path
) -> None:
    tmp_path.joinpath(".samples.npz.0123.tmp").write_bytes(b"half")
    (tmp_path / "samples.npz").write_bytes(b"half")
    sample_images(replace(request_, overwrite=True), tmp_path)
    assert contents(tmp_path) == contents(whole)


# Damage


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "other"])
def test_a_damaged_part_is_named_and_made_again(
    whole: Path, request_: SampleRequest, tmp_path: Path, harm: str, capfd: pytest.CaptureFixture[str]
) -> None:
    request_ = replace(request_, batch=4)
    for index in (0, 1):
        sample_images(request_, tmp_path, Worker(index, 3))
    part = next((tmp_path / "parts").glob("00000004-*"))
    data = bytearray(part.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    elif harm == "truncate":
        del data[-1000:]
    elif harm == "empty":
        data.clear()
    else:
        data = bytearray(next((tmp_path / "parts").glob("00000000-*")).read_bytes())
    part.write_bytes(data)
    assert sample_images(request_, tmp_path, Worker(2, 3)) == tmp_path
    said = capfd.readouterr().err
    assert f"{part} (images 4 to 7) is damaged: " in said
    assert "sampling these images again" in said
    assert contents(tmp_path) == contents(whole)


def test_a_damaged_npz_is_never_committed(request_: SampleRequest, tmp_path: Path) -> None:
    real = assembly.check_npz

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "check_npz", damage)
        with pytest.raises(DataError, match=r"samples\.npz is damaged"):
            sample_images(request_, tmp_path)
    assert read_mark(tmp_path) is None
    assert len(parts(tmp_path)) == 6


def test_a_listed_file_that_is_gone(request_: SampleRequest, tmp_path: Path) -> None:
    sample_images(request_, tmp_path)
    os.truncate(tmp_path / "samples.npz", 1000)
    with pytest.raises(DataError, match=r"samples\.npz: expected the \d+ bytes that samples\.json lists"):
        sample_images(request_, tmp_path)


# Protocols


def changed(request_: SampleRequest, tiny_vae: str) -> dict[str, SampleRequest]:
    return {
        'sampling.steps: the folder has "2", this command "3"': replace(
            request_, settings=replace(request_.settings, steps="3")
        ),
        "sampling.seed: the folder has 3, this command 4": replace(
            request_, settings=replace(request_.settings, seed=4)
        ),
        "sampling.tile: the folder has 2, this command 3": replace(
            request_, settings=replace(request_.settings, tile=3)
        ),
        "images: the folder has 11, this command 12": replace(request_, num_images=12),
        'labels.drawn: the folder has "random", this command "balanced"': replace(
            request_, labels=LabelChoice(drawn="balanced")
        ),
        'precision: the folder has "fp32", this command "bf16"': replace(
            request_, engine=EngineConfig(device="cpu", precision="bf16")
        ),
        "weights.sha256: the folder has ": replace(
            request_,
            source=replace(
                request_.source, state={**request_.source.state, "pos_embed": torch.zeros(1, 4, 128)}
            ),
        ),
    }


def test_another_protocol_is_refused_and_each_difference_named(
    whole: Path, request_: SampleRequest, tiny_vae: str
) -> None:
    before = contents(whole)
    for said, other in changed(request_, tiny_vae).items():
        with pytest.raises(StorageError, match="holds samples of another protocol") as caught:
            sample_images(other, whole)
        assert f"\n  {said}" in str(caught.value)
        assert str(caught.value).count("\n  ") == 1
        assert "--out, or replace its samples with --overwrite" in str(caught.value)
    assert contents(whole) == before


def test_a_moved_run_is_the_same_protocol(whole: Path, request_: SampleRequest) -> None:
    moved = replace(request_.source, description="elsewhere")
    assert sample_images(replace(request_, source=moved), whole) == whole


def test_overwrite_replaces_a_folder_when_the_new_samples_are_complete(
    whole: Path, request_: SampleRequest, tmp_path: Path
) -> None:
    old = replace(request_, settings=replace(request_.settings, seed=9), formats=("npz", "png", "tar"))
    sample_images(old, tmp_path)
    assert sample_images(replace(old, num_images=9, overwrite=True), tmp_path, Worker(0, 2)) is None
    before = (tmp_path / "samples.npz").read_bytes()
    new = replace(request_, overwrite=True)
    assert sample_images(new, tmp_path, Worker(0, 2)) is None
    assert (tmp_path / "samples.npz").read_bytes() == before
    assert read_mark(tmp_path) is None, "a reader must not take the old samples for the new ones"
    assert sample_images(new, tmp_path, Worker(1, 2)) == tmp_path
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("name", ["protocol.json", "samples.json"])
def test_a_damaged_file_of_the_folder_is_named(request_: SampleRequest, tmp_path: Path, name: str) -> None:
    sample_images(request_, tmp_path)
    data = (tmp_path / name).read_text()
    (tmp_path / name).write_text(data.replace('"images": 11', '"images": 12'))
    with pytest.raises(DataError, match=rf"{name} is damaged"):
        sample_images(request_, tmp_path)


def test_samples_without_a_protocol_are_not_replaced(request_: SampleRequest, tmp_path: Path) -> None:
    (tmp_path / "samples.npz").write_bytes(b"of another program")
    with pytest.raises(StorageError, match=r"holds samples\.npz without a protocol\.json; choose another"):
        sample_images(request_, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


# Formats


def test_png_and_tar_hold_the_same_images(whole: Path, request_: SampleRequest, tmp_path: Path) -> None:
    sample_images(request_, tmp_path)
    mine = {**contents(whole)}
    assert sample_images(replace(request_, formats=("png", "tar")), tmp_path) == tmp_path
    with np.load(tmp_path / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == [f"{i:08}-class{label:04}.png" for i, label in enumerate(labels)]
    for name, image in zip(names, images, strict=True):
        with Image.open(tmp_path / "png" / name) as png:
            assert np.array_equal(np.asarray(png), image)
    with tarfile.open(tmp_path / "samples.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:2]] == ["00000000.png", "00000000.cls"]
        assert {(m.mtime, m.uid, m.uname) for m in members} == {(0, 0, "")}
        with Image.open(tar.extractfile(members[6])) as png:  # type: ignore[arg-type]
            assert np.array_equal(np.asarray(png), images[3])
        assert [int(tar.extractfile(m).read()) for m in members[1::2]] == labels.tolist()  # type: ignore[union-attr]
    assert (tmp_path / "samples.npz").read_bytes() == mine["samples.npz"]
    mark = read_mark(tmp_path)
    assert mark is not None
    assert set(mark["files"]) == {"samples.npz", "grid.png", "png", "samples.tar"}
    other = tmp_path / "other"
    sample_images(replace(request_, formats=("npz", "png", "tar")), other, Worker())
    assert contents(other) == {k: v for k, v in contents(tmp_path).items() if not k.startswith("other")}


# What does not match


def test_another_vae_is_refused(request_: SampleRequest, tmp_path: Path) -> None:
    other = save_tiny_vae(tmp_path / "other", seed=1)
    with pytest.raises(WeightsError, match=r"this VAE \(other, sha256 .*\) did not make the latents"):
        sample_images(replace(request_, vae=other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_class_is_refused_before_any_work(request_: SampleRequest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="class 5: expected 0 to 4"):
        sample_images(replace(request_, labels=LabelChoice(classes=(0, 5))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_steps_than_the_diffusion_has_are_refused(request_: SampleRequest, tmp_path: Path) -> None:
    settings = replace(request_.settings, steps="250")
    with pytest.raises(ConfigError, match="has 100 of the 100 timesteps"):
        sample_images(replace(request_, settings=settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_workers_of_independent_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Worker.from_environment() == Worker(0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Worker.from_environment() == Worker(3, 8)
    assert Worker.from_environment(node=2, num_nodes=4) == Worker(19, 32)
    with pytest.raises(ConfigError, match="--node 4: expected 0 to 3 with --nodes 4"):
        Worker.from_environment(node=4, num_nodes=4)
