"""`dit-scale evaluate --mirror`: the score cards of a run in its mirrors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit_scale import cli
from dit_scale.telemetry.sinks.identity import run_id
from tests.support.report_runs import write_card, write_run
from tests.support.wandb_files import records_of

HOUR_S = 3600


def write_ended_run(folder: Path, **log: object) -> str:
    """Write a run whose files have not changed for an hour."""
    run = write_run(folder, log=log)
    for path in folder.rglob("*"):
        os.utime(path, (path.stat().st_mtime - HOUR_S,) * 2)
    return run


def test_wandb_and_tensorboard_get_the_figures_at_the_steps_of_the_weights(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = write_ended_run(tmp_path / "run", wandb="offline", tensorboard=True)
    write_card(run, 21.5, step=20)
    write_card(run, 30.5, where="samples-early")
    command = [sys.executable, "-m", "dit_scale.cli", "evaluate", "--mirror", run]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(command, env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"sent 2 score cards of {run} to 2 of 2 mirrors\n"

    (file,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{run_id(tmp_path / 'run')}.wandb")
    found = {key: value for record in records_of(file)["summary"] for key, value in record["update"].items()}
    early = {"samples-early/FID.inception": 30.5, "samples-early/step": 40}  # the last step, as it is unknown
    assert found.items() >= {"samples/FID.inception": 21.5, "samples/step": 20, **early}.items()

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    found = {name: board.Scalars(f"{name}/FID.inception") for name in ("samples", "samples-early")}
    assert [(one.step, one.value) for (one,) in found.values()] == [(20, 21.5), (40, 30.5)]


def refusal(run: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["evaluate", "--mirror", run]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_mirrored_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = write_run(tmp_path / "live", log={"tensorboard": True})
    write_card(live, 1.0)
    assert "is running, and its own process writes to the mirrors" in refusal(live, capsys)
    assert "has no score cards yet" in refusal(write_ended_run(tmp_path / "bare", tensorboard=True), capsys)
    silent = write_ended_run(tmp_path / "silent")
    card = write_card(silent, 21.5)
    assert "has no mirror: expected log.wandb, log.tensorboard or log.trackio" in refusal(silent, capsys)
    card.write_bytes(card.read_bytes().replace(b"21.5", b"1.55"))
    assert "is damaged (its SHA-256 is wrong)" in refusal(silent, capsys)
    assert "expected a run folder" in refusal(str(tmp_path), capsys)
