"""Mirrors of the record, and the journal."""

import json
import threading
from pathlib import Path

import pytest

from dit_scale.config import TrainConfig
from dit_scale.errors import ConfigError
from dit_scale.journal import Journal, read_journal
from dit_scale.telemetry.sinks import check_installed, open_mirrors
from dit_scale.telemetry.sinks.identity import id_of, run_id
from dit_scale.telemetry.sinks.mirror import Mirror
from dit_scale.telemetry.sinks.tensorboard_sink import TensorBoard
from tests.support.faults.small_disk import small_disk


@pytest.fixture
def alarms() -> list[str]:
    return []


def test_mirrors_only_when_asked_for(alarms: list[str]) -> None:
    assert open_mirrors(TrainConfig(), 0, alarms.append) == []


def test_the_package_of_a_requested_mirror_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_installed(TrainConfig().log)
    for key, value, name in [
        ("wandb", "offline", "wandb"),
        ("tensorboard", True, "tensorboard"),
        ("trackio", True, "'dit-scale"),
    ]:
        log = TrainConfig.model_validate({"log": {key: value}}).log
        with pytest.raises(ConfigError, match=f"{key} is not installed; pip install {name}"):
            check_installed(log)


class FailingSink:
    """A sink that fails from its n-th call on."""

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.rows: list[int] = []
        self._count()

    def write(self, step: int, record: dict[str, float | None]) -> None:
        self._count()
        self.rows.append(step)

    def close(self) -> None:
        self._count()

    def _count(self) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise BrokenPipeError("its process is gone")


@pytest.mark.parametrize(
    ("calls", "what"), [(0, "failed to start"), (2, "failed"), (4, "failed to finish"), (5, "")]
)
def test_a_mirror_that_fails_costs_one_alarm(alarms: list[str], calls: int, what: str) -> None:
    mirror = Mirror("wandb", lambda: FailingSink(calls), alarms.append)
    for step in (1, 2, 3):
        mirror.write(step, {"loss": 1.0})
    mirror.close()
    mirror.close()
    text = f"wandb {what} and gets no more rows; metrics.jsonl has all of them: its process is gone"
    assert alarms == ([text] if what else [])


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps in ((0, (100, 200, 300)), (200, (300, 400))):
        sink = TensorBoard(tmp_path, resume_step)
        for step in steps:
            sink.write(step, {"loss": resume_step + step / 4})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    # The second attempt took step 300 again and purged that of the first.
    assert loss == [(100, 25.0), (200, 50.0), (300, 275.0), (400, 300.0)]


def test_wandb_offline_writes_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alarms: list[str]
) -> None:
    import wandb

    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "my_run"
    folder.mkdir()
    config = TrainConfig.model_validate({"run": str(folder), "log": {"wandb": "offline"}})
    (mirror,) = open_mirrors(config, 0, alarms.append)
    for step in (100, 200):
        mirror.write(step, {"loss": 0.123456789})
    mirror.close()
    wandb.teardown()  # as at the end of a run: waits for wandb's own process, which writes the file
    (written,) = (folder / "wandb").glob(f"offline-run-*/run-{run_id(folder)}.wandb")
    data = written.read_bytes()
    assert b"loss" in data
    assert b"0.123456789" in data
    assert alarms == []


def test_tensorboard_on_a_full_disk(
    tmp_path: Path, alarms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's thread fails some rows later; neither `write` nor `close` may wait for it forever."""
    run = tmp_path / "run"
    run.mkdir()
    config = TrainConfig.model_validate({"run": str(run), "log": {"tensorboard": True}})
    before = set(threading.enumerate())
    monkeypatch.setattr(threading, "excepthook", lambda raised: None)  # the thread raises the error as well
    with small_disk(tmp_path / "disk", 4096) as disk:
        (run / "tensorboard").symlink_to(disk)
        (mirror,) = open_mirrors(config, 0, alarms.append)
        for step in range(1, 2000):
            mirror.write(step, {"loss": 1.0})
        mirror.close()
        for thread in set(threading.enumerate()) - before:
            thread.join()
    (alarm,) = alarms
    assert alarm.startswith("TensorBoard ")
    assert "No space left on device" in alarm


def test_a_run_that_moves_keeps_its_run_id(tmp_path: Path) -> None:
    first = run_id(tmp_path / "a")
    assert first.startswith(str(tmp_path / "a").strip("/").replace("/", "-"))
    assert first not in {run_id(tmp_path / "b"), run_id(tmp_path / "a" / "a")}
    assert len(run_id(tmp_path / ("x" * 200))) <= 128
    assert run_id(tmp_path / "a b") != run_id(tmp_path / "a#b")
    assert id_of("s3://a/imagenet256") != id_of("/a/imagenet256")
    for folder in ("offline-run-20260102_030405-runs-a", "run-20260101_000000-other"):
        (tmp_path / "moved" / "wandb" / folder).mkdir(parents=True)
    assert run_id(tmp_path / "moved") == "runs-a"


def test_the_journal_is_append_only(tmp_path: Path, alarms: list[str]) -> None:
    path = tmp_path / "events.jsonl"
    for event in ("start", "checkpoint"):
        journal = Journal(path, alarms.append)
        journal.write(event, step=3, name="x")
        assert journal.close() == ""
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event.pop("event") for event in events] == ["start", "checkpoint"]
    for clock in ("time_s", "monotonic_s"):
        times = [event.pop(clock) for event in events]
        assert times == sorted(times)
    assert events == [{"step": 3, "name": "x"}] * 2


def test_half_a_line_of_the_journal_counts_as_never_written(tmp_path: Path, alarms: list[str]) -> None:
    path = tmp_path / "events.jsonl"
    for torn in ('{"event": "sta', ""):
        path.write_text('{"event": "first", "time_s": 1}\n' + torn)
        journal = Journal(path, alarms.append)
        journal.write("second")
        journal.close()
        assert [event["event"] for event in read_journal(path)] == ["first", "second"]
