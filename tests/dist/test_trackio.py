"""Runs in Trackio, as its own program reads them."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dit_scale.config import TrainConfig
from dit_scale.telemetry.sinks.identity import run_id
from tests.support.latents import write_latents
from tests.support.needs import needs
from tests.support.ranks import jobs
from tests.support.ranks.held_run import held_run
from tests.support.ranks.processes import TIMEOUT_S
from tests.support.ranks.runs import events

pytestmark = pytest.mark.dist

STEPS = 8
BIN = Path(sys.prefix, "bin")
PROJECT = "dit-scale"


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    needs((BIN / "trackio").exists(), "trackio: pip install --no-deps trackio")
    write_latents(tmp_path / "data", num=40)
    config = jobs.saving(jobs.small_config(tmp_path / "run", tmp_path / "data"), steps=STEPS)
    return config.model_copy(update={"log": config.log.model_copy(update={"trackio": True})})


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has never used Trackio or Hugging Face."""
    return {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}


def trackio(folder: Path, *arguments: str) -> Any:
    """Return what Trackio's program says about its databases in a folder."""
    done = subprocess.run(
        [str(BIN / "trackio"), *arguments, "--project", PROJECT, "--json"],
        env={"TRACKIO_DIR": str(folder), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_killed_run_is_one_run_with_each_row_once(
    config: TrainConfig, tmp_path: Path, environment: dict[str, str]
) -> None:
    """An attempt that is stopped, one that is killed and one that finishes; the last repeats steps."""
    folder, name = Path(config.run, "trackio"), run_id(Path(config.run))

    def losses() -> list[tuple[int, float]]:
        found = trackio(folder, "get", "metric", "--run", name, "--metric", "loss")["values"]
        return [(row["step"], row["value"]) for row in found]

    with held_run(config, tmp_path / "stopped", [2], **environment) as process:
        process.wait()
        process.process.send_signal(signal.SIGTERM)
        process.go()
        assert process.end() == 75, process.log.read_text()
    (saved,) = events(config, "waited")
    resumed = saved["step"]
    with held_run(config, tmp_path / "killed", [3], **environment) as process:
        process.wait()
        process.wait_until(lambda: len(losses()) > resumed)
    assert [step for step, _ in losses()] == [*range(1, resumed + 3)]
    with held_run(config, tmp_path / "finished", **environment) as process:
        assert process.end() == 0, process.log.read_text()
    assert f"resumed at step {resumed}" in (tmp_path / "finished/log").read_text()
    assert "Trackio" not in (tmp_path / "finished/log").read_text(), "neither alarms nor advertising"
    assert losses() == [(row["step"], row["loss"]) for row in jobs.losses(config)]
    assert trackio(folder, "list", "runs")["runs"] == [name]
    found = trackio(folder, "get", "run", "--run", name)
    assert found["config"]["model"]["name"] == config.model.name
    assert set(found["metrics"]) >= {"loss", "grad_norm", "lr", "images_per_s"}


def test_a_folder_that_cannot_be_written_costs_one_alarm(
    config: TrainConfig, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Trackio itself only warns."""
    (tmp_path / "file").touch()
    environment["TRACKIO_DIR"] = str(tmp_path / "file")
    with held_run(config, tmp_path / "held", **environment) as process:
        assert process.end() == 0, process.log.read_text()
    (alarm,) = events(config, "alarm")
    assert re.fullmatch(
        "Trackio failed.* and gets no more rows; metrics.jsonl has all of them: "
        "trackio warned on stderr: write-logs-to-sqlite",
        alarm["text"],
    )
    assert len(jobs.losses(config)) == STEPS


WRITER = """
from pathlib import Path
import sys
from dit_scale.telemetry.sinks.trackio_sink import Trackio
sink = Trackio(Path(sys.argv[1]), "dit-scale", "run", {})
sink.write(1, {"loss": None, "lr": 0.5})
sink.picture(1, "evaluation", Path(sys.argv[1], "grid.png"))
sink.close()
"""


def test_grids_and_means_over_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    """Two attempts write them at the same step."""
    needs((BIN / "trackio").exists(), "trackio: pip install --no-deps trackio")
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    for _ in range(2):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        subprocess.run(command, env=os.environ | environment, timeout=TIMEOUT_S, check=True)
    found = trackio(tmp_path / "trackio", "get", "snapshot", "--run", "run", "--step", "1")["metrics"]
    assert [row["value"] for row in found["loss"]] == [None]
    assert [row["value"] for row in found["lr"]] == [0.5]
    (grid,) = found["evaluation"]
    assert (tmp_path / "trackio/media" / grid["value"]["file_path"]).is_file()
