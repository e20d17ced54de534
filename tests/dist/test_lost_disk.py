"""When the disk of the run folder is full or the folder is missing, the run raises an alarm and continues.

The tests run the public command on a separate file system.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from dit_scale.config import TrainConfig, load
from tests.support.faults.small_disk import fill
from tests.support.ranks import jobs
from tests.support.ranks.held_run import held_run
from tests.support.ranks.processes import run
from tests.support.ranks.runs import events, final_files, steps_of

pytestmark = pytest.mark.dist

STEPS = 60
"""Enough steps for the lines to fill several disk pages."""


def config_of(folder: Path, data: Path, **checkpoint: object) -> TrainConfig:
    return jobs.saving(jobs.small_config(folder, data), steps=STEPS, every_steps=20, **checkpoint)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = config_of(tmp_path_factory.mktemp("straight"), data)
    assert run(1, jobs.train, config) == [0]
    return config


def alarms(config: TrainConfig) -> list[str]:
    return [event["text"] for event in events(config, "alarm")]


def test_the_disk_is_full_for_a_while(data: Path, straight: TrainConfig, tmp_path: Path, disk: Path) -> None:
    """Record, journal and checkpoints are on the full disk."""
    config = config_of(disk / "run", data)
    with held_run(config, tmp_path / "held", [2, 58]) as process:
        process.wait()
        filler = fill(disk)
        process.go()
        process.wait()
        filler.unlink()
        process.go()
        assert process.end() == 0, process.log.read_text()
    log = process.log.read_text()
    assert "Traceback" not in log
    for name in ("records/0001.jsonl", "events.jsonl"):
        assert f"{name} cannot be written: No space left on device" in log
        assert f"{name} can be written again; all buffered lines are written" in log
    assert jobs.losses(config) == jobs.losses(straight)
    assert final_files(config) == final_files(straight)
    assert load(TrainConfig, disk / "run/config.yaml") == load(TrainConfig, tmp_path / "held/run.yaml")
    assert len(events(config, "save_failed")) == 2
    assert any("records/0001.jsonl cannot be written" in text for text in alarms(config))
    assert [event["step"] for event in events(config, "log")] == list(range(1, STEPS + 1))


def test_the_disk_is_full_at_the_start(data: Path, straight: TrainConfig, tmp_path: Path, disk: Path) -> None:
    config = config_of(disk / "run", data)
    filler = fill(disk)
    with held_run(config, tmp_path / "held") as process:
        process.wait_until(lambda: "waiting for free space" in process.log.read_text())
        filler.unlink()
        assert process.end() == 0, process.log.read_text()
    assert "ALARM: the run cannot start, waiting for free space: cannot write" in process.log.read_text()
    assert jobs.losses(config) == jobs.losses(straight)


def test_the_disk_stays_full_at_the_start(data: Path, tmp_path: Path, disk: Path) -> None:
    fill(disk)
    with held_run(config_of(disk / "run", data, deadline_s=1.0), tmp_path / "held") as process:
        assert process.end() == 2
    log = process.log.read_text()
    assert "Traceback" not in log
    assert "No space left on device; free some space" in log
    assert "waited 1 s for free space" in log


def test_a_run_without_a_record_fails(data: Path, tmp_path: Path, disk: Path) -> None:
    """The checkpoints are elsewhere."""
    config = config_of(disk / "run", data, url=str(tmp_path / "bucket"))
    with held_run(config, tmp_path / "held", [2]) as process:
        process.wait()
        fill(disk)
        process.go()
        assert process.end() == 2
    log = process.log.read_text()
    assert "Traceback" not in log
    assert f"all {STEPS} steps are taken and saved, but {disk}/run/records/0001.jsonl is missing" in log
    assert "done:" not in log


def test_a_read_only_folder_is_refused_before_any_work(data: Path, tmp_path: Path, disk: Path) -> None:
    """A read-only folder is permanent, unlike a full disk."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    config = config_of(disk / "run", data, url=str(tmp_path / "bucket"))
    with held_run(config, tmp_path / "held") as process:
        assert process.end() == 2
    log = process.log.read_text()
    assert "Traceback" not in log
    assert f"cannot write {disk}/run/.writable-" in log
    assert "Read-only file system; choose a writable folder" in log
    assert not (tmp_path / "bucket/attempts").exists()


@pytest.mark.parametrize("url", ["", "bucket"])
def test_the_folder_is_removed(data: Path, straight: TrainConfig, tmp_path: Path, url: str) -> None:
    config = config_of(tmp_path / "run", data, url=url and str(tmp_path / url))
    with held_run(config, tmp_path / "held", [30]) as process:
        process.wait()
        shutil.rmtree(config.run)
        process.go()
        assert process.end() == 0, process.log.read_text()
    assert (
        "records/0001.jsonl was removed or replaced; writing continues in a new file"
        in process.log.read_text()
    )
    assert jobs.losses(config) == jobs.losses(straight)
    assert final_files(config) == final_files(straight)
    assert load(TrainConfig, tmp_path / "run/config.yaml") == load(TrainConfig, tmp_path / "held/run.yaml")
    assert [event["step"] for event in events(config, "start")] == [0]
    assert any("was removed" in text for text in alarms(config))
    more = config.model_copy(update={"steps": STEPS + 2})
    assert run(1, jobs.train, more) == [0]
    assert steps_of(more) == list(range(1, STEPS + 3))
