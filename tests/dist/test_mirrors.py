"""Mirrors of a run that is killed, and mirrors that fail: the public command with the real libraries."""

import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from dit_scale.config import TrainConfig, dump
from dit_scale.telemetry.sinks.identity import run_id
from dit_scale.telemetry.webhook import URL_VARIABLE
from tests.support.latents import write_latents
from tests.support.ranks import jobs, rollback_jobs
from tests.support.ranks.held_run import held_run
from tests.support.ranks.processes import TIMEOUT_S
from tests.support.ranks.runs import events
from tests.support.wandb_files import records_of
from tests.support.webhook import SECRET, receiver

pytestmark = pytest.mark.dist

STEPS = 8
KEY = "0123456789abcdef0123456789abcdef01234567"
"""An API key of W&B that must appear nowhere."""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a user who has never used wandb."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}


def config_of(tmp_path: Path, wandb: str) -> TrainConfig:
    write_latents(tmp_path / "data", num=40)
    config = jobs.saving(jobs.small_config(tmp_path / "run", tmp_path / "data"), steps=STEPS)
    return config.model_copy(update={"log": config.log.model_copy(update={"wandb": wandb})})


def services(parent: int) -> list[int]:
    """Return the processes that wandb started for a process that uses it."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [pid for pid in map(int, children) if b"wandb" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_the_process_of_wandb_is_killed(tmp_path: Path, environment: dict[str, str]) -> None:
    config = config_of(tmp_path, "offline")
    with held_run(config, tmp_path / "held", [4], **environment) as process:
        process.wait()
        found = services(process.process.pid)
        assert found
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        process.go()
        assert process.end() == 0, process.log.read_text()
    assert process.log.read_text().count("ALARM: wandb failed and gets no more rows") == 1
    (alarm,) = events(config, "alarm")
    assert alarm["text"].startswith("wandb failed and gets no more rows; metrics.jsonl has all of them: ")
    assert len(jobs.losses(config)) == STEPS


def test_wandb_without_a_key_does_not_prompt(tmp_path: Path, environment: dict[str, str]) -> None:
    """The alarm is logged on a terminal as well."""
    config = config_of(tmp_path, "online")
    (tmp_path / "run.yaml").write_text(dump(config))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dit_scale.cli", "train", str(tmp_path / "run.yaml")]
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, "TERM": "xterm"},
            stdin=theirs,
            stderr=theirs,
            stdout=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # what a closed terminal sends
            while part := os.read(ours, 4096):
                shown += part
        assert process.wait(TIMEOUT_S) == 0, shown[-2000:].decode(errors="replace")
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    (alarm,) = events(config, "alarm")
    assert alarm["text"].startswith("wandb failed to start and gets no more rows")
    assert "No API key configured" in alarm["text"]
    assert len(jobs.losses(config)) == STEPS


def files_with(folder: Path, *texts: str) -> list[str]:
    """Return the files that contain one of these texts."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in found if any(text.encode() in path.read_bytes() for text in texts)]


def test_a_killed_run_is_one_run_in_wandb_and_no_secret_is_written(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """An attempt that is stopped, one that is killed and one that finishes write rows under one id."""
    config = config_of(tmp_path, "offline")
    config = config.model_copy(update={"log": config.log.model_copy(update={"tensorboard": True})})
    written = Path(config.run, "wandb")
    with receiver() as (url, received):
        environment |= {"WANDB_API_KEY": KEY, URL_VARIABLE: url}
        with held_run(config, tmp_path / "stopped", [2], **environment) as process:
            process.wait()
            process.process.send_signal(signal.SIGTERM)
            process.go()
            assert process.end() == 75, process.log.read_text()
        with held_run(config, tmp_path / "killed", [3], **environment) as process:
            process.wait()
            # wandb's process writes its file every 15 s
            process.wait_until(lambda: all(path.stat().st_size > 1000 for path in written.glob("*/*.wandb")))
        for name in ("finished", "finished already"):
            with held_run(config, tmp_path / name, **environment) as process:
                assert process.end() == 0, process.log.read_text()
        assert [(one["event"], one["step"]) for one in received.messages] == [("done", STEPS)]
    files = sorted(written.glob(f"offline-run-*/run-{run_id(Path(config.run))}.wandb"))
    attempts = [records_of(file) for file in files[:3]]
    for records in attempts:
        (of_run,) = records["run"]
        assert of_run["run_id"] == run_id(Path(config.run))
        assert of_run["config"]["update"]["model"]["name"] == config.model.name
        assert "memory_percent" in records["stats"][0]["item"], "system metrics"
    steps = [[row["item"]["_step"] for row in records["history"]] for records in attempts]
    resumed = events(config, "start")[1]["step"]
    assert steps[0] == list(range(1, resumed + 1))
    assert steps[1]
    assert steps[1] == list(range(resumed + 1, resumed + 1 + len(steps[1]))), "rows of the killed attempt"
    assert steps[2] == list(range(resumed + 1, STEPS + 1))
    rows = {row["item"]["_step"]: row["item"]["loss"] for records in attempts for row in records["history"]}
    assert rows == {row["step"]: row["loss"] for row in jobs.losses(config)}
    assert files_with(tmp_path, KEY, SECRET) == []


def test_a_webhook_that_fails_costs_one_alarm(tmp_path: Path, environment: dict[str, str]) -> None:
    config = config_of(tmp_path, "off")
    environment[URL_VARIABLE] = f"http://127.0.0.1:1/{SECRET}"
    with held_run(config, tmp_path / "held", **environment) as process:
        assert process.end() == 0, process.log.read_text()
    (alarm,) = events(config, "alarm")
    assert alarm["text"].endswith("failed, and its message is lost: Connection refused")
    assert process.log.read_text().count("ALARM") == 1
    assert files_with(tmp_path, SECRET) == []


def test_a_rollback_sends_a_message(tmp_path: Path, environment: dict[str, str]) -> None:
    write_latents(tmp_path / "data", num=rollback_jobs.NUM)
    rollback_jobs.spoil(tmp_path / "data", [rollback_jobs.sample_of(step, 0) for step in (5, 6)])
    config = rollback_jobs.config_of(tmp_path / "run", tmp_path / "data", rollback_after=2)
    with receiver() as (url, received):
        environment[URL_VARIABLE] = url
        with held_run(config, tmp_path / "held", **environment) as process:
            assert process.end() == 0, process.log.read_text()
    first, last = received.messages
    assert (first["event"], first["step"]) == ("rolled_back", 6)
    assert first["reason"] == "2 steps in a row failed, starting at step 5"
    assert last["event"] == "done"
