"""When storage fails during a save, training continues with an alarm, and the next save succeeds."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dit_scale.config import TrainConfig, dump
from tests.support.faults.proxy import FaultProxy
from tests.support.needs import needs
from tests.support.ranks import jobs
from tests.support.ranks.points import Hold
from tests.support.ranks.processes import TIMEOUT_S, run, start
from tests.support.ranks.runs import events, final_files, kill, wait_for, wait_for_event
from tests.support.s3 import BUCKET, s3_server

pytestmark = pytest.mark.dist

WORLD = 2
STEPS = 16


def config_of(folder: Path, data: Path, **checkpoint: object) -> TrainConfig:
    return jobs.saving(jobs.small_config(folder, data), steps=STEPS, every_steps=4, **checkpoint)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = config_of(tmp_path_factory.mktemp("straight"), data)
    assert run(WORLD, jobs.train, config) == [0, 0]
    return config


def finish(answers: Any) -> list[Any]:
    return [answers.get(timeout=TIMEOUT_S)[1:] for _ in range(WORLD)]


def test_disk_full(data: Path, straight: TrainConfig, tmp_path: Path, disk: Path) -> None:
    config = config_of(tmp_path / "run", data, url=str(disk))
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 1_000_000))
    hold = Hold(tmp_path, "after the step", 12)
    ranks, answers = start(WORLD, jobs.train_held, config, hold, 0)
    try:
        wait_for(hold, answers)
        failures = events(config, "save_failed")
        filler.unlink()
        hold.go.touch()
        assert finish(answers) == [(None, 0)] * WORLD
    finally:
        kill(ranks)
    assert failures, "training must continue to step 12 although the save of step 4 failed"
    assert "No space left on device; free some space" in failures[0]["problem"]
    assert events(config, "checkpoint")
    assert final_files(config) == final_files(straight)


def test_s3_is_down(
    data: Path, straight: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        s3_server() as environment,
        FaultProxy(int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2])) as proxy,
    ):
        behind = {**environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        for name, value in behind.items():
            monkeypatch.setenv(name, value)
        config = config_of(tmp_path / "run", data, url=f"s3://{BUCKET}/down")
        hold = Hold(tmp_path, "after the step", 3)
        ranks, answers = start(
            WORLD, jobs.in_environment, behind, jobs.train_with_impatient_writer, config, hold, 0
        )
        try:
            wait_for(hold, answers)
            proxy.down()
            hold.go.touch()
            wait_for_event(config, "save_failed")
            proxy.calm()
            assert finish(answers) == [(None, 0)] * WORLD
        finally:
            kill(ranks)
        assert "no answer from the S3 server" in events(config, "save_failed")[0]["problem"]
        assert final_files(config) == final_files(straight)


def test_a_writer_that_is_killed_is_replaced(data: Path, straight: TrainConfig, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", data)
    hold = Hold(tmp_path, "writer: inside the file", 2)
    ranks, answers = start(WORLD, jobs.train_held, config, hold, 1)
    try:
        os.kill(wait_for(hold, answers), signal.SIGKILL)
        hold.go.touch()
        assert finish(answers) == [(None, 0)] * WORLD
    finally:
        kill(ranks)
    (failure,) = events(config, "save_failed")
    assert "rank 1: its writer process exited with -9" in failure["problem"]
    assert final_files(config) == final_files(straight)


@pytest.fixture(scope="module")
def wall_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that shifts the wall clock of the process that loads it."""
    needs(shutil.which("gcc") is not None, "gcc")
    library = tmp_path_factory.mktemp("clock") / "wall_clock.so"
    source = Path(__file__).parents[1] / "support" / "faults" / "wall_clock.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def test_the_clock_jumps_by_a_day(data: Path, tmp_path: Path, wall_clock: Path) -> None:
    """The wall clock of the processes jumps one day forward, then two days back."""
    offset_s = tmp_path / "offset"
    offset_s.write_text("0")
    shifted = {"LD_PRELOAD": str(wall_clock), "WALL_CLOCK_OFFSET": str(offset_s)}
    straight, jumping = (
        jobs.saving(jobs.small_config(tmp_path / name, data), steps=20, every_steps=4)
        for name in ("straight", "jumping")
    )
    assert run(1, jobs.train, straight) == [0]
    (tmp_path / "run.yaml").write_text(dump(jumping))
    holds = [Hold(tmp_path / str(nth), "after the step", nth) for nth in (7, 15)]
    for hold in holds:
        hold.folder.mkdir()
    command = [
        sys.executable,
        "-m",
        "tests.support.ranks.held_train",
        str(tmp_path / "run.yaml"),
        holds[0].point,
    ]
    command += [str(tmp_path), *(str(hold.nth) for hold in holds)]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env={**os.environ, **shifted}, stdout=output, stderr=output)
    try:
        for hold, seconds in zip(holds, (86_400, -86_400), strict=True):
            while not hold.reached.exists():
                assert process.poll() is None, log.read_text()
                time.sleep(0.02)
            offset_s.write_text(str(seconds))
            hold.go.touch()
        assert process.wait(timeout=TIMEOUT_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    times = [event["time_s"] - time.time() for event in events(jumping, "checkpoint")]
    assert max(times) > 80_000
    assert min(times) < -80_000
    assert final_files(jumping) == final_files(straight)
    assert jobs.losses(jumping) == jobs.losses(straight)
