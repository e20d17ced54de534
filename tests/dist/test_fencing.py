"""An old attempt that wakes up after the next one began can neither commit nor prune.

The old one is held at a point, stopped with SIGSTOP, and woken with SIGCONT when the new one is done.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import CHECKPOINTS, MANIFEST, name_of
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.train.run_folder import root_of
from tests.support.ranks import jobs
from tests.support.ranks.points import Hold
from tests.support.ranks.processes import TIMEOUT_S, run, start
from tests.support.ranks.runs import events, final_files, kill, wait_for
from tests.support.s3 import BUCKET, s3_server

pytestmark = pytest.mark.dist

WORLD = 2


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture
def place(
    request: pytest.FixtureRequest, server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, dict[str, str]]:
    """The root of a run's state, and what a process needs to reach it."""
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
    """The ids of a rank and of its writer."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [process.pid, *map(int, children)]


def on_disk_and_on_s3(point: str, nth: int, *marks: pytest.MarkDecorator) -> list[Any]:
    """`marks`: of the case on S3, which takes three times as long."""
    on_s3 = pytest.param("s3", point, nth, marks=marks, id=f"s3-{point}")
    return [pytest.param("disk", point, nth, id=f"disk-{point}"), on_s3]


@pytest.mark.parametrize(
    ("place", "point", "nth"),
    [
        *on_disk_and_on_s3("writer: before the manifest", 2, pytest.mark.long),
        *on_disk_and_on_s3("writer: behind the chain's answer", 3),
        *on_disk_and_on_s3("writer: in retention", 1, pytest.mark.long),
        *on_disk_and_on_s3("writer: retention, the chain has answered", 7),
    ],
    indirect=["place"],
)
def test_an_old_attempt_that_wakes_up_changes_nothing(
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
    assert all("SupersededError" in error and "attempt 2 of this run has begun" in error for error in errors)
    assert committed(root) == before
    assert keys <= {key for key, _ in root.list()}, "the old attempt deleted something of the new one's"
    for path in before:
        Checkpoint(root, path).verify()
    assert final_files(config) == final_files(straight)
    assert jobs.losses(config) == jobs.losses(straight)
    assert run(WORLD, jobs.in_environment, environment, jobs.train, config) == [0, 0]
    assert final_files(config) == final_files(straight)


def test_the_last_save_is_not_tried_again_under_a_name_that_is_taken(data: Path, tmp_path: Path) -> None:
    """An older manifest is copied into its folder just before the commit; the next start has another name."""
    config = config_of(tmp_path / "run", data, "")
    hold = Hold(tmp_path, "writer: before the manifest", nth=4)
    ranks, answers = start(1, jobs.train_held, config, hold, 0)
    try:
        wait_for(hold, answers)
        older, last = (root_of(config).local_path(f"{CHECKPOINTS}/{name_of(step, 1)}") for step in (9, 12))
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
    assert note.startswith(f"skipping checkpoint {CHECKPOINTS}/{name_of(12, 1)}: {last} holds step 9 of ")
    assert committed(root_of(config))[0] == f"{CHECKPOINTS}/{name_of(12, 2)}"
