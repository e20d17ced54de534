"""End to end with the commands of the README: images, Ray, latents, deepspeed, samples, export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_scale import weights
from dit_scale.inference.sources import build_model, open_source
from dit_scale.models import dit
from dit_scale.models.embeddings import sincos_pos_embed
from tests.support.faults.ports import free_port
from tests.support.speed import scaled

pytestmark = pytest.mark.pipeline

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CLI = "dit_scale.cli"


def launcher() -> tuple[object, ...]:
    """Return the command of two processes under the deepspeed launcher, on a free port."""
    return "deepspeed", "--num_gpus", 2, "--master_port", free_port(), "--no_local_rank", "--module", CLI


def command(*words: object) -> str:
    """Run a command like a user and return its output; on failure, show all of it."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=scaled(600.0),
    )
    assert done.returncode == 0, f"{words} left with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of colored noise as PNG files, encoded by the job with the demo's autoencoder."""
    folder = tmp_path_factory.mktemp("digits")
    draws = np.random.Generator(np.random.Philox(key=1))
    for index in range(24):
        path = folder / "images" / f"class{index % 2}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    config = "configs/encode_demo.yaml"
    encode = ("python", "data_pipeline/encode_latents.py", "--config", config)
    command(*encode, f"source={folder / 'images'}", f"output={folder / 'latents'}", "encoders=1")
    command("dit-scale", "latents", "verify", folder / "latents")
    return folder / "latents"


@pytest.fixture(scope="module")
def run(latents: Path) -> Path:
    """A few steps in bf16 at ZeRO-3 on two processes under the deepspeed launcher."""
    folder = latents.parent / "run"
    settings = (
        "steps=6",
        "global_batch=8",
        "engine.zero_stage=3",
        "log.every_steps=2",
        "log.tensorboard=true",
    )
    command(*launcher(), "train", "configs/demo.yaml", *settings, f"run={folder}", f"data.url={latents}")
    return folder


def test_run_folder_holds_the_record(run: Path) -> None:
    record = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in record] == [2, 4, 6]
    assert all(0 < row["loss"] < 2 for row in record)
    assert any((run / "tensorboard").iterdir())
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "first_step", *["log"] * 3, "save", "checkpoint", "waited", "done"]
    status = json.loads(command("dit-scale", "status", run, "--json"))
    assert (status["state"], status["step"], status["interruptions"]) == ("finished", 6, [])
    assert sum(status["spent_s"].values()) == pytest.approx(status["wall_s"])
    assert status["spent_s"]["productive"] > 0
    listed = json.loads(command("dit-scale", "checkpoint", "list", run, "--json"))
    assert [row["step"] for row in listed] == [6]


def test_samples_are_the_same_from_one_and_from_two_processes(run: Path, tmp_path: Path) -> None:
    sample = ("sample", run, "--images", 6, "--tile", 3, "--labels", "balanced", "--steps", "5", "--out")
    command("dit-scale", *sample, tmp_path / "one")
    command(*launcher(), *sample, tmp_path / "two")
    one, two = (np.load(tmp_path / name / "samples.npz") for name in ("one", "two"))
    assert one["arr_0"].shape == (6, 64, 64, 3)
    assert one["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(one["arr_0"], two["arr_0"])
    assert one["arr_1"].tolist() == [0, 1, 2, 3, 4, 5]
    with Image.open(tmp_path / "one" / "grid.png") as grid:
        assert grid.mode == "RGB"


def test_export_of_a_bf16_zero_3_run(run: Path, tmp_path: Path) -> None:
    exported = tmp_path / "weights.safetensors"
    command("dit-scale", "checkpoint", "export", run, exported)
    source = open_source(str(exported))
    model = build_model(source, torch.device("cpu"), torch.float32)
    formula = sincos_pos_embed(model.shape.width, model.shape.grid)
    assert torch.equal(weights.read(exported)["pos_embed"], formula)
    fresh = dit.build(source.model, seed=0)
    assert not torch.equal(fresh.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert torch.equal(fresh.pos_embed, model.pos_embed)
