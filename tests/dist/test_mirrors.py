"""A mirror that fails at any time costs one alarm: the public command with the real libraries."""

import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from dit_scale.config import TrainConfig, dump
from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.held_run import held_run
from tests.support.ranks.processes import TIMEOUT_S
from tests.support.ranks.runs import events

pytestmark = pytest.mark.dist

STEPS = 8


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
