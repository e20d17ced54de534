"""Mistakes of users with every command: one message, exit code 2, no traceback."""

import os
from pathlib import Path

import pytest

from dit_scale import cli
from dit_scale.data.shards import INFO_KEY
from tests.support.bare_user import without_power
from tests.support.latents import write_latents
from tests.support.tiny_run import write_run
from tests.support.tiny_vae import save_tiny_vae

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("status", "{}"),
    ("checkpoint", "list", "{}"),
    ("checkpoint", "verify", "{}"),
    ("checkpoint", "keep", "{}", "0000000040-0001"),
    ("checkpoint", "prune", "{}"),
    ("checkpoint", "export", "{}", "out.safetensors"),
    ("ema", "list", "{}"),
    ("ema", "reconstruct", "{}", "--sigma-rel", "0.1", "--out", "out.safetensors"),
    ("latents", "info", "{}"),
    ("latents", "verify", "{}"),
    ("latents", "show", "{}"),
    ("latents", "show", "{data}", "--vae", "{}"),
    ("replay", "{}", "--step", "1"),
    ("sample", "{}"),
    ("sample", "{run}", "--vae", "{}", "--images", "1", "--device", "cpu"),
    ("sample", "{run}", "--ema", "{}"),
    ("sample", "{run}", "--model", "{}"),
    ("train", "{}"),
    ("train", "{}", "--dry-run"),
    ("plan", "{}", "--gpus", "8", "--images-per-s", "1"),
    ("plan", "demo", "--gpus", "8", "--speed-from", "{}"),
    ("encode", "--config", "{}"),
    ("config", "{}"),
    ("models", "{}"),
)
NAMES = (
    "none",
    "file",
    "file/below",
    "garbage.safetensors",
    "garbage.pt",
    "binary.yaml",
    "list.yaml",
    "folder",
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    write_run(folder / "run", save_tiny_vae(tmp_path_factory.mktemp("vae")))
    write_latents(folder / "data", num=4)
    (folder / "file").write_text("x")
    for name in ("garbage.safetensors", "garbage.pt", "binary.yaml"):
        (folder / name).write_bytes(bytes(range(255, -1, -1)))
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "folder").mkdir()
    (folder / "folder" / INFO_KEY).write_text("[1]")
    return folder


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not query the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_place_of_the_wrong_kind(
    places: Path,
    command: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(places)
    before = sorted(os.listdir(places))
    for name in NAMES:
        place = str(places / name)
        arguments = [word.format(place, run=places / "run", data=places / "data") for word in command]
        assert cli.main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert f"dit-scale {command[0]}" in said
        assert "Traceback" not in said
    assert sorted(os.listdir(places)) == before


@pytest.mark.usefixtures("same_process")
def test_a_run_below_a_file(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        f"run={places / 'file' / 'below'}",
        f"data.url={places / 'data'}",
        "engine.device=cpu",
        "steps=1",
    ]
    overrides += ["global_batch=2", "model={name: DiT-Nano/2, image_size: 32, num_classes: 10}"]
    assert cli.main(["train", "demo", *overrides]) == 2
    assert str(places / "file") in capsys.readouterr().err


@pytest.mark.parametrize("command", [("status", "{}"), ("checkpoint", "list", "{}"), ("train", "{}/x.yaml")])
def test_a_folder_without_permission(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    arguments = [word.format(tmp_path / "locked") for word in command]
    done = without_power(f"import sys; from dit_scale import cli; sys.exit(cli.main({arguments}))")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"dit-scale {command[0]}")
    assert line.endswith("Permission denied")
