"""A rank that loses a peer without a supervisor prints one line; its traceback is in the run folder."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.public_run import PublicRun, Shape, wait_until

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_reports_the_loss_of_a_peer(tmp_path: Path, stage: int) -> None:
    write_latents(tmp_path / "data", num=40)
    config = jobs.small_config(tmp_path / "run", tmp_path / "data", zero_stage=stage)
    run = PublicRun(jobs.saving(config, 1000, every_steps=4), Shape(2, stage))
    try:
        started = run.start("ranks")
        assert wait_until(lambda: run.commits() > 0, started), started.text()
        os.kill(started.processes[1].pid, signal.SIGKILL)
        assert started.wait() == [1, -signal.SIGKILL]
    finally:
        run.end_all()
    text = started.text()
    (line,) = [line for line in text.splitlines() if line.startswith("dit-scale train: rank 0: ")]
    assert "another rank has exited, and this rank cannot continue without it" in line
    (kept,) = (tmp_path / "run" / "errors").glob("*-rank0.txt")
    assert line.endswith(f"Details: {kept}")
    assert "Traceback (most recent call last)" in kept.read_text()
    assert "Traceback" not in text
