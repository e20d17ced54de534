"""A stale process that resumes after the next attempt started can neither commit nor prune.

The old attempt is held at a point and stopped with SIGSTOP. It resumes with SIGCONT after the new attempt has
finished.
"""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import MANIFEST, CheckpointId
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.train.run_folder import root_of
from tests.support.ranks import jobs
from tests.support.ranks.points import Hold
from tests.support.ranks.processes import TIMEOUT_S, run, start
from tests.support.ranks.runs import events, final_files, kill, wait_for
from tests.support.s3 import BUCKET

pytestmark = pytest.mark.dist

WORLD = 2


@pytest.fixture
def place(
    request: pytest.FixtureRequest, server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, dict[str, str]]:
    """The root of a run, and the environment variables that a process needs to reach it."""
    if request.param == "disk":
        return "", {}
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}", server


def config_of(folder: Path, data: Path, url: str) -> TrainConfig:
    return jobs.saving(jobs.small_config(folder, data), steps=12, every_steps=3, url=url)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = config_of(tmp_path_factory.mktemp("straight"), data, "")
    assert run(WORLD, jobs.train, config) == [0, 0]
    return config


def family(process: Any) -> list[int]:
    """Return the process ids of a rank and its writer."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [process.pid, *map(int, children)]


def on_disk_and_on_s3(point: str, nth: int, *marks: pytest.MarkDecorator) -> list[Any]:
    """Return the two cases of a point. `marks` apply to S3, which takes three times as long."""
    on_s3 = pytest.param("s3", point, nth, marks=marks, id=f"s3-{point}")
    return [pytest.param("disk", point, nth, id=f"disk-{point}"), on_s3]


@pytest.mark.parametrize(
    ("place", "point", "nth"),
    [
        *on_disk_and_on_s3("writer: before the manifest", 2, pytest.mark.long),
        *on_disk_and_on_s3("writer: after the fencing check", 3),
        *on_disk_and_on_s3("writer: in retention", 1, pytest.mark.long),
        *on_disk_and_on_s3("writer: in retention, after the fencing check", 7),
    ],
    indirect=["place"],
)
def test_a_stale_process_changes_nothing(
    data: Path, straight: TrainConfig, tmp_path: Path, place: tuple[str, dict[str, str]], point: str, nth: int
) -> None:
    url, environment = place
    config = config_of(tmp_path / "run", data, url)
    root = root_of(config)
    hold = Hold(tmp_path, point, nth)
    old, answers = start(WORLD, jobs.in_environment, environment, jobs.train_held, config, hold, 0)
    try:
        wait_for(hold, answers)
        stopped = [number for process in old for number in family(process)]
        for number in stopped:
            os.kill(number, signal.SIGSTOP)
        assert run(WORLD, jobs.in_environment, environment, jobs.train, config) == [0, 0]
        before, keys = committed(root), {key for key, _ in root.list()}
        hold.go.touch()
        for number in stopped:
            os.kill(number, signal.SIGCONT)
        errors = [answers.get(timeout=TIMEOUT_S)[1] for _ in range(WORLD)]
    finally:
        kill(old)
    assert all(
        "SupersededError" in error and "attempt 2 of this run has started" in error for error in errors
    )
    assert committed(root) == before
    assert keys <= {key for key, _ in root.list()}, "the old attempt deleted something of the new one's"
    for checkpoint_id in before:
        Checkpoint(root, checkpoint_id).verify()
    assert final_files(config) == final_files(straight)
    assert jobs.losses(config) == jobs.losses(straight)
    assert run(WORLD, jobs.in_environment, environment, jobs.train, config) == [0, 0]
    assert final_files(config) == final_files(straight)


def test_the_last_save_is_not_retried_under_a_used_name(data: Path, tmp_path: Path) -> None:
    """An older manifest appears in the folder just before the commit; the next start uses another folder."""
    config = config_of(tmp_path / "run", data, "")
    hold = Hold(tmp_path, "writer: before the manifest", nth=4)
    ranks, answers = start(1, jobs.train_held, config, hold, 0)
    try:
        wait_for(hold, answers)
        older, last = (root_of(config).local_path(CheckpointId(step, 1).path()) for step in (9, 12))
        assert older is not None
        assert last is not None
        shutil.copy(older / MANIFEST, last / MANIFEST)
        hold.go.touch()
        error = answers.get(timeout=TIMEOUT_S)[1]
    finally:
        kill(ranks)
    assert "CheckpointError" in error
    assert f"the last save failed: rank 0: {last} has a manifest already" in error
    assert (older / MANIFEST).read_bytes() == (last / MANIFEST).read_bytes()
    assert run(1, jobs.train, config) == [0]
    (note,) = events(config, "start")[-1]["notes"]
    assert note.startswith(f"skipping checkpoint {CheckpointId(12, 1).path()}: {last} holds step 9 of ")
    assert committed(root_of(config))[0] == CheckpointId(12, 2)
