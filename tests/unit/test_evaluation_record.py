"""What an evaluation leaves in record, mirrors, status, ledger and heartbeats."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dit_scale import cli
from dit_scale.config import TrainConfig, dump
from dit_scale.elastic.node.deadlines import Deadlines
from dit_scale.heartbeat import MEASURED_STEPS, Heart, Phase, beat_path, read_beat
from dit_scale.journal import Event
from dit_scale.ledger import Heading
from dit_scale.report.goodput import ledger
from dit_scale.report.status import status_of
from dit_scale.telemetry.sinks import open_mirrors
from dit_scale.telemetry.sinks.mirror import Mirror
from dit_scale.train.logbook import carried_over

EVALUATE = {"every_steps": 10, "held_out": 0.1}
ROWS: list[dict[str, Any]] = [
    {"step": 0, "samples": 0, "eval_loss_ema.paper": 1.0, "eval_loss_raw": 1.0},
    {"step": 10, "images_per_s": 8.0, "loss": 0.5},
    {"step": 10, "samples": 40, "eval_loss_ema.paper": 0.25, "eval_mse_ema.paper": 0.2, "eval_loss_raw": 0.3},
    {"step": 20, "images_per_s": 16.0, "loss": 0.4},
    {"step": 20, "samples": 80, "eval_loss_ema.paper": 0.5, "eval_mse_ema.paper": 0.4, "eval_loss_raw": 0.4},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that evaluated its weights three times."""
    config = {"run": str(tmp_path), "global_batch": 4, "evaluate": EVALUATE}
    (tmp_path / "config.yaml").write_text(dump(TrainConfig.model_validate(config)))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    start = {"event": "start", "time_s": 1.0, "monotonic_s": 1.0, "attempt": 1, "step": 0}
    (tmp_path / "events.jsonl").write_text(json.dumps(start) + "\n")
    return tmp_path


def test_status_has_the_last_evaluation_and_the_best(run: Path) -> None:
    status = status_of(str(run), 2.0)
    assert status.evaluation == ROWS[-1]
    assert status.best == {"step": 10, "eval_loss_ema.paper": 0.25}
    assert status.steps_per_s == 4.0


def test_status_prints_one_line_about_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(run)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  evaluation")]
    last, best = "eval_loss_ema.paper 0.5, eval_loss_raw 0.4", "eval_loss_ema.paper 0.25"
    assert line == f"  evaluation  step 20: {last}; best {best} at step 10"


def test_status_without_evaluations_has_no_such_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    assert cli.main(["status", str(run)]) == 0
    assert "evaluation  step" not in capsys.readouterr().out
    status = status_of(str(run), 2.0)
    assert (status.evaluation, status.best) == ({}, {})


def test_a_run_that_starts_over_carries_no_row(run: Path) -> None:
    config = TrainConfig.model_validate({"run": str(run)})
    assert carried_over(config, None, 1).rows == ()


def test_the_ledger_has_its_seconds() -> None:
    def event(at_s: float, kind: Event, **details: Any) -> dict[str, Any]:
        return {"time_s": at_s, "monotonic_s": at_s, "event": kind, "attempt": 1, **details}

    found = ledger(
        [
            event(0.0, Event.START, step=0),
            event(4.0, Event.EVALUATION, step=0, seconds=3.0),
            event(5.0, Event.FIRST_STEP, step=1),
            event(10.0, Event.EVALUATION, step=4, seconds=2.5),
            event(12.0, Event.WAITED, step=5, stall_s=1.0),
        ],
        {},
    )
    assert found.by_name()["evaluation"] == 5.5
    assert found.seconds(Heading.REPLAYED) == 7.0 - 2.5 - 1.0  # no checkpoint keeps the steps


def test_an_evaluation_has_its_own_deadline_and_is_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = [10**9]
    monkeypatch.setattr("dit_scale.heartbeat.time.monotonic_ns", lambda: now_ns[0])
    heart = Heart(0, str(tmp_path))
    for step in range(1, 4 * MEASURED_STEPS + 1):
        heart.beat(Phase.COMPUTE, step)
        now_ns[0] += 10**9
        if step % 8 == 0:
            heart.beat(Phase.EVALUATE, step)
            now_ns[0] += 500 * 10**9
    beat = read_beat(beat_path(tmp_path, 0))
    assert beat is not None
    assert (beat.phase, beat.p99_s) == (Phase.EVALUATE, 1.0)
    assert Deadlines().of(beat) == Deadlines().evaluate_s == 600.0


class Pictures:
    """A sink that keeps the pictures it gets."""

    def __init__(self) -> None:
        self.pictures: list[tuple[int, str, Path]] = []

    def write(self, step: int, record: dict[str, float | None]) -> None:
        raise AssertionError("no row was written")

    def picture(self, step: int, name: str, path: Path) -> None:
        self.pictures.append((step, name, path))
        if not path.exists():
            raise OSError("gone")

    def close(self) -> None:
        raise AssertionError("it failed before")


def test_a_mirror_gets_pictures_until_one_fails(tmp_path: Path) -> None:
    alarms: list[str] = []
    sink, path = Pictures(), tmp_path / "grid.png"
    mirror = Mirror("mirror", lambda: sink, alarms.append)
    path.touch()
    mirror.picture(1, "evaluation", path)
    path.unlink()
    mirror.picture(2, "evaluation", path)
    mirror.picture(3, "evaluation", path)
    mirror.close()
    assert [step for step, _, _ in sink.pictures] == [1, 2]
    assert len(alarms) == 1


def test_tensorboard_gets_the_picture(tmp_path: Path) -> None:
    alarms: list[str] = []
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "grid.png")
    config = TrainConfig.model_validate({"run": str(tmp_path / "run"), "log": {"tensorboard": True}})
    (mirror,) = open_mirrors(config, 0, alarms.append)
    mirror.picture(7, "evaluation", tmp_path / "grid.png")
    mirror.close()
    (written,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"evaluation" in written.read_bytes()
    assert b"\x89PNG" in written.read_bytes()
    assert alarms == []
