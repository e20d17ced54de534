"""Files that an earlier version wrote are read by this one.

earlier_files.tar.xz holds a latent data set and a run on it, both written at commit 72a2160. The model of the
run is smaller than DiT-Nano to keep its files small. History of the run:

    attempt 1   steps 1-2, under the deepspeed launcher; `steps` was 2
    attempt 2   round 1: rank 1 was killed in step 125, nothing of it was saved
    attempt 3   round 2: steps 3-62, then stopped by SIGTERM
    attempt 4   round 3: steps 63-64; `steps` was 64
"""

import json
import tarfile
from pathlib import Path

import pytest

from dit_scale.cli import main
from dit_scale.config import TrainConfig, load
from dit_scale.data.shards import LatentDataset
from dit_scale.models import zoo
from tests.support.ranks import jobs, processes
from tests.support.ranks.runs import events

ARCHIVE = Path(__file__).with_name("earlier_files.tar.xz")


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The folder with `run` and `latents`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_the_data_set_is_read(earlier: Path) -> None:
    data = LatentDataset.open(str(earlier / "latents"))
    assert (len(data), data.info.class_names) == (12, ("cat", "dog", "eel"))
    assert data.info.channel_mean == pytest.approx((-2.006190, 0.082155, 0.015444, 0.082413), abs=1e-6)
    assert [item.path for item in data.info.quarantined] == ["eel/broken.png"]
    assert main(["latents", "verify", str(earlier / "latents")]) == 0


def test_the_checkpoint_is_read(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(earlier / "run")
    assert main(["checkpoint", "verify", run]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "list", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "0000000064-0004", "step": 64, "bytes": 121648}]


def test_the_stored_averages_are_read(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ema", "list", str(earlier / "run")]) == 0
    assert "0000000064-0004" in capsys.readouterr().out


def test_the_journals_are_read(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(earlier / "run"), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["step"], status["steps"]) == ("finished", 64, 64)
    assert (status["attempt"], status["round"], status["nodes"]) == (4, 3, ["vm"])
    failed, left = status["interruptions"]
    assert (failed["reason"], failed["rank"], failed["step"], failed["lost_steps"]) == ("failed", 1, 124, 122)
    assert (left["reason"], left["step"], left["lost_steps"]) == ("leaving", 62, 0)
    assert status["wall_s"] == 84.864908
    assert {heading: spent_s for heading, spent_s in status["spent_s"].items() if spent_s} == {
        "stopped": 24.803191,
        "waiting": 0.121745,
        "restart": 52.707474,
        "startup": 1.232349,
        "replayed": 2.69765,
        "productive": 2.332199,
        "data": 0.0006,
        "checkpoint": 0.4037,
        "restore": 0.566,
    }


def test_the_run_is_resumed(earlier: Path) -> None:
    run, data = earlier / "run", earlier / "latents"
    overrides = [f"run={run}", f"data.url={data}", "steps=66"]
    config = load(TrainConfig, str(run / "config.yaml"), overrides)
    processes.run(1, _train, config)
    start = events(config, "start")[-1]
    assert (start["attempt"], start["resumed_from"]) == (5, "checkpoints/0000000064-0004")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 63, 64, 65, 66]


def _train(config: TrainConfig) -> None:
    zoo.SIZES["Nano"] = zoo.ModelSize(1, 8, 1)
    assert jobs.train(config) == 0
