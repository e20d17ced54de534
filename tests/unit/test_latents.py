"""`dit-scale latents`: output, exit codes and pictures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_scale import cli, vae
from dit_scale.data.shards import INFO_KEY, LatentDataset
from dit_scale.inference.preview import decode, random_ids
from tests.support.latents import edit_info, write_latents
from tests.support.tiny_vae import save_tiny_vae

REASONS = {f"a/{number}.txt": f"no picture {number}" for number in range(7)}


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture
def latents(tmp_path: Path, tiny_vae: str) -> Path:
    """Random latents of ten named classes, with quarantined inputs, encoded by the tiny VAE."""
    folder = tmp_path / "set"
    write_latents(folder, num=20, shard_samples=6)
    edit_info(
        folder,
        vae=vae.load(tiny_vae).identity().model_dump(mode="json"),
        class_names=[f"n{label}" for label in range(10)],
        quarantined=[
            {"key": 20 + number, "path": path, "reason": reason}
            for number, (path, reason) in enumerate(REASONS.items())
        ],
        source=json.loads((folder / INFO_KEY).read_text())["source"] | {"count": 27},
    )
    return folder


def test_info(latents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = LatentDataset.open(latents).info
    assert cli.main(["latents", "info", str(latents)]) == 0
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[0] == str(latents)
    for expected in (
        "samples 20 of 10 classes",
        "images 32 px, crop none",
        "latents [2, 8, 4, 4] <f2, views image and mirror",
        f"VAE tiny, scale 0.18215, weights sha256 {info.vae.weights_sha256}",
        "source random random: 27 inputs",
        f"listing sha256 {'0' * 64}",
        "channel mean " + " ".join(f"{value:.6f}" for value in info.channel_mean),
        "channel std " + " ".join(f"{value:.6f}" for value in info.channel_std),
        "quarantined 7 inputs",
    ):
        assert expected in lines
    assert lines[-6:] == [
        *(f"{path}: {reason}" for path, reason in list(REASONS.items())[:5]),
        "and 2 more; --quarantined lists all",
    ]


def test_info_names_all_that_were_quarantined(latents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["latents", "info", str(latents), "--quarantined"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines[-7:]] == [f"{path}: {reason}" for path, reason in REASONS.items()]


def test_info_for_machines(latents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["latents", "info", str(latents), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    on_disk = json.loads((latents / INFO_KEY).read_text())
    shards = on_disk.pop("shards")
    del on_disk["sha256"]
    tars = sum(path.stat().st_size for path in (latents / "shards").glob("*.tar"))
    assert tree == {"url": str(latents), **on_disk, "num_shards": len(shards), "bytes": tars}


def test_info_needs_dataset_json_alone_and_no_torch(latents: Path) -> None:
    for path in (latents / "shards").iterdir():
        path.unlink()
    script = f"""
import sys
from dit_scale import cli
assert cli.main(["latents", "info", {str(latents)!r}]) == 0
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_verify(latents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["latents", "verify", str(latents), "--threads", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "sound: 20 samples in 4 shards, 10 classes, 7 of 27 inputs quarantined\n"
    assert printed.err == ""
    assert cli.main(["latents", "verify", str(latents), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"url": str(latents), "samples": 20, "problems": []}


def test_verify_names_every_problem(latents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("00001", "00003"):
        (latents / "shards" / f"{name}.tar").unlink()
    problems = [f"cannot read {latents}/shards/0000{shard}.tar: not found" for shard in (1, 3)]
    assert cli.main(["latents", "verify", str(latents)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [f"damaged: {problem}" for problem in problems]
    assert cli.main(["latents", "verify", str(latents), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == problems


@pytest.mark.parametrize("action", ["info", "verify", "show"])
def test_no_finished_data_set(action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["latents", action, str(tmp_path)]) == cli.USER_ERROR_EXIT_CODE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"dit-scale latents {action}: {tmp_path} has no dataset.json: not a latent")


def show(latents: Path, *more: str) -> int:
    return cli.main(["latents", "show", str(latents), "--device", "cpu", *more])


def test_show(latents: Path, tiny_vae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "grid.png"
    assert show(latents, "--vae", tiny_vae, "--images", "4", "--seed", "5", "--out", str(out)) == 0
    dataset, decoder = LatentDataset.open(latents), vae.load(tiny_vae)
    ids = random_ids(20, 4, 5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["sample", "label", "class"]
    assert [line.split() for line in lines[3:7]] == [
        [str(sample_id), str(sample_id % 10), f"n{sample_id % 10}"] for sample_id in ids
    ]
    assert lines[8:] == [f"4 samples, image | mirror -> {out}"]
    with Image.open(out) as file:
        grid = np.asarray(file)
    # two rows of two samples, each of two views with two white pixels behind, and two between samples
    assert grid.shape == (2 * 34 + 2, 2 * 70 + 2, 3)
    for place, sample_id in enumerate(ids):
        top, left = 2 + place // 2 * 34, 2 + place % 2 * 70
        for view, image_HW3 in enumerate(decode(dataset, decoder, sample_id)[0]):
            start = left + view * 34
            assert np.array_equal(grid[top : top + 32, start : start + 32], image_HW3)


def test_show_is_reproducible(latents: Path, tiny_vae: str, tmp_path: Path) -> None:
    pictures = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        np.random.seed(len(pictures))
        out = tmp_path / f"{name}.png"
        assert show(latents, "--vae", tiny_vae, "--seed", seed, "--out", str(out)) == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_show_chosen_samples(
    latents: Path, tiny_vae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "grid.png")
    assert show(latents, "--vae", tiny_vae, "--ids", "17, 3", "--out", out) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:5]] == ["17", "3"]
    assert show(latents, "--vae", tiny_vae, "--ids", "20", "--out", out) == cli.USER_ERROR_EXIT_CODE
    assert "sample 20: this data set has samples 0 to 19" in capsys.readouterr().err


def test_show_refuses_another_vae(latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, out = save_tiny_vae(tmp_path / "other", seed=1), tmp_path / "grid.png"
    assert show(latents, "--vae", other, "--out", str(out)) == cli.USER_ERROR_EXIT_CODE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "did not make the latents" in printed.err
    assert not out.exists()


def test_show_into_a_place_that_cannot_be_written(
    latents: Path, tiny_vae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "grid.png"
    assert show(latents, "--vae", tiny_vae, "--out", str(out)) == cli.USER_ERROR_EXIT_CODE
    assert f"cannot write {out}: " in capsys.readouterr().err
