"""Where measurements go: the record after a resume, the mirrors, the journal."""

import json
from pathlib import Path

import pytest

from dit_scale.config import TrainConfig
from dit_scale.telemetry.sinks import Journal, JsonLines, TensorBoard, open_sinks, wandb_id, wandb_id_of


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_steps(path: Path, resume_step: int, *steps: int) -> None:
    sink = JsonLines(path, resume_step)
    for step in steps:
        sink.write(step, {"loss": step / 3})
    sink.close()


def test_a_record_is_one_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, 100, 200)
    assert path.read_text() == (
        '{"step": 100, "loss": 33.333333333333336}\n{"step": 200, "loss": 66.66666666666667}\n'
    )


def test_a_line_is_written_before_the_next_step(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    sink.write(1, {"loss": 1.0})
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    sink.close()


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(0, []), (199, [100]), (200, [100, 200]), (999, [100, 200, 300])]
)
def test_steps_taken_again_are_dropped(tmp_path: Path, resume_step: int, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, 100, 200, 300)
    before = path.read_text().splitlines()
    write_steps(path, resume_step, 1000)
    assert steps_of(path) == [*kept, 1000]
    assert path.read_text().splitlines()[:-1] == before[: len(kept)]


TORN = [b'{"step": 30', b'{"step": 300, "lo', b"{", b'{"step": 300, "loss": 1.0}', b"\0\0\0", b"3", b"\xff"]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_last_line_counts_as_never_written(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, 100, 200)
    with path.open("ab") as file:
        file.write(torn)
    write_steps(path, 200, 300, 400)
    assert steps_of(path) == [100, 200, 300, 400]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 100}')
    write_steps(path, 100, 200)
    assert steps_of(path) == [100, 200]


def test_mirrors_only_when_asked_for(tmp_path: Path) -> None:
    sinks = open_sinks(tmp_path, TrainConfig(), 0)
    assert [type(sink) for sink in sinks] == [JsonLines]
    sinks[0].close()


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
    # Step 300 of the first attempt was taken again: the second one purged it.
    assert loss == [(100, 25.0), (200, 50.0), (300, 275.0), (400, 300.0)]


def test_wandb_offline_writes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "my_run"
    folder.mkdir()
    config = TrainConfig.model_validate({"log": {"wandb": "offline"}})
    sinks = open_sinks(folder, config, 0)
    for step in (100, 200):
        for sink in sinks:
            sink.write(step, {"loss": 0.123456789})
    for sink in sinks:
        sink.close()
    wandb.teardown()  # waits for wandb's own process, which writes the file, as the end of a run does
    (written,) = (folder / "wandb").glob(f"offline-run-*/run-{wandb_id(folder)}.wandb")
    data = written.read_bytes()
    assert b"loss" in data
    assert b"0.123456789" in data
    assert steps_of(folder / "metrics.jsonl") == [100, 200]


def test_a_run_keeps_its_wandb_id_where_it_moves(tmp_path: Path) -> None:
    first = wandb_id(tmp_path / "a")
    assert first.startswith(str(tmp_path / "a").strip("/").replace("/", "-"))
    assert first not in {wandb_id(tmp_path / "b"), wandb_id(tmp_path / "a" / "a")}
    assert len(wandb_id(tmp_path / ("x" * 200))) <= 128
    assert wandb_id(tmp_path / "a b") != wandb_id(tmp_path / "a#b")
    assert wandb_id_of("s3://a/imagenet256") != wandb_id_of("/a/imagenet256")
    for folder in ("offline-run-20260102_030405-runs-a", "run-20260101_000000-other"):
        (tmp_path / "moved" / "wandb" / folder).mkdir(parents=True)
    assert wandb_id(tmp_path / "moved") == "runs-a"


def test_the_journal_only_grows(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for event in ("start", "checkpoint"):
        journal = Journal(path)
        journal.write(event, step=3, name="x")
        journal.close()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event.pop("event") for event in events] == ["start", "checkpoint"]
    for clock in ("time_s", "monotonic_s"):
        times = [event.pop(clock) for event in events]
        assert times == sorted(times)
    assert events == [{"step": 3, "name": "x"}] * 2


def test_half_a_line_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for torn in ('{"event": "sta', ""):
        path.write_text('{"event": "first"}\n' + torn)
        journal = Journal(path)
        journal.write("second")
        journal.close()
        lines = path.read_text().splitlines()
        assert [json.loads(line)["event"] for line in lines] == ["first", "second"]
