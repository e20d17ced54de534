"""Output files: checked before the work, replaced atomically, and unchanged if the disk is full."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_scale import cli, weights
from dit_scale.cli.arguments import weights_file
from dit_scale.errors import StorageError
from dit_scale.sampling.image_files import write_grid, write_tar
from dit_scale.sampling.npz_files import write_npz
from dit_scale.storage.outputs import check_output, new_file
from tests.support.bare_user import without_power

LIMIT_BYTES = 4096


@contextmanager
def little_room() -> Iterator[None]:
    """Limit files of this process to LIMIT_BYTES, so that a write fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NOISE = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)

WRITERS: dict[str, Callable[[Path], object]] = {
    "weights.safetensors": lambda path: weights.write({"w": torch.randn(10_000)}, path, {}),
    "grid.png": lambda path: write_grid(NOISE, path),
    "samples.npz": lambda path: write_npz([NOISE], np.zeros(4, int), path),
    "samples.tar": lambda path: write_tar([NOISE], [0, 0, 0, 0], path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_leaves_only_the_old_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"old")
    with little_room(), pytest.raises(StorageError, match=f"cannot write .*{name}: "):
        WRITERS[name](tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_parent_folders_are_created(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / "a" / "b" / name)
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [name]


def test_an_error_of_the_command_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with new_file(tmp_path / "out") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_check_creates_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "c.png", ".png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("folder.png", "is a folder, expected the name of a file to write"),
        ("file/c.png", "/file is not a folder"),
        ("file/a/b/c.png", "/file is not a folder"),
        ("c.jpg", "expected a name that ends in .png"),
        ("s3://bucket/c.png", "expected a file on this machine"),
        (f"{'x' * 300}.png", "File name too long"),
    ],
)
def test_paths_that_cannot_be_written(
    tmp_path: Path, out: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=said):
        check_output(out, ".png")


def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    arguments = ["checkpoint", "export", "run", f"{tmp_path}/locked/x.safetensors"]
    done = without_power(f"from dit_scale import cli; cli.main({arguments})")
    assert f"no permission to write in {tmp_path}/locked; check its owner and mode" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "{run}", "--out", "{file}"),
        ("sample", "{run}", "--out", "s3://bucket/samples"),
        ("checkpoint", "export", "{run}", "{file}/x.safetensors"),
        ("checkpoint", "export", "{run}", "{folder}.safetensors"),
        ("ema", "reconstruct", "{run}", "--sigma-rel", "0.1", "--out", "{file}/x.safetensors"),
        ("latents", "show", "{data}", "--out", "{folder}.png"),
        ("latents", "show", "{data}", "--out", "{folder}.gif"),
    ],
    ids=" ".join,
)
def test_commands_check_their_output_first(
    tmp_path: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the output although run and data set do not exist either."""
    (tmp_path / "file").touch()
    for suffix in (".safetensors", ".png"):
        (tmp_path / f"folder{suffix}").mkdir()
    places = {name: str(tmp_path / name) for name in ("file", "folder", "run", "data")}
    filled = [text.format(**places) for text in arguments]
    assert cli.main(filled) == 2
    said = capsys.readouterr().err
    assert filled[-1] in said
    assert len(said.splitlines()) == 1


def test_a_home_directory_that_the_shell_did_not_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert weights_file("~/x.safetensors") == "/home/somebody/x.safetensors"
    assert cli._parse(["sample", "x", "--out=~/y"]).out == "/home/somebody/y"
