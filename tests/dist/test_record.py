"""A run whose checkpoints are elsewhere keeps its record and journal when it moves to another machine."""

import json
import shutil
from pathlib import Path

import pytest

from dit_scale.config import TrainConfig
from dit_scale.storage import open_storage
from dit_scale.train.run_folder import METRICS, root_of
from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.processes import run
from tests.support.ranks.runs import events

pytestmark = pytest.mark.dist


def steps_of(text: str) -> list[int]:
    return [json.loads(line)["step"] for line in text.splitlines()]


def train(config: TrainConfig, folder: Path, steps: int) -> TrainConfig:
    """Return the configuration that trains to this step in this folder."""
    here = config.model_copy(update={"run": str(folder), "steps": steps})
    assert run(1, jobs.train, here) == [0]
    return here


def test_the_record_moves_with_the_checkpoint(tmp_path: Path) -> None:
    """Each folder stands for the disk of one machine; the disk is lost, or returns unchanged."""
    write_latents(tmp_path / "data")
    config = jobs.small_config(tmp_path / "a", tmp_path / "data", precision="fp32")
    config = jobs.saving(config, 2, url=str(tmp_path / "bucket"))
    a = train(config, tmp_path / "a", 2)
    b = train(config, tmp_path / "b", 4)
    assert steps_of((tmp_path / "b" / METRICS).read_text()) == [1, 2, 3, 4]
    assert [event["step"] for event in events(b, "start")] == [0, 2]

    # the first machine has a record of two steps, and a line of a step that was lost
    with (Path(a.run) / METRICS).open("a") as record:
        record.write('{"step": 3, "loss": 100.0}\n')
    a = train(config, tmp_path / "a", 6)
    rows = [json.loads(line) for line in (Path(a.run) / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert max(row["loss"] for row in rows) < 100.0
    assert [event["step"] for event in events(a, "start")] == [0, 2, 4]

    shutil.rmtree(a.run)
    root = root_of(config)
    newest = sorted(key for key, _ in root.list("checkpoints/") if key.endswith(f"/{METRICS}"))[-1]
    assert steps_of(open_storage(tmp_path / "bucket").read(newest).decode()) == [1, 2, 3, 4, 5, 6]


def test_a_run_in_one_folder_copies_no_record_to_its_checkpoints(tmp_path: Path) -> None:
    write_latents(tmp_path / "data")
    config = jobs.small_config(tmp_path / "a", tmp_path / "data", precision="fp32")
    train(config, tmp_path / "a", 1)
    assert not list((tmp_path / "a/checkpoints").rglob("*.jsonl"))
