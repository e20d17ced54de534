"""Metrics for Prometheus: following the files of a run, and serving what they say."""

import json
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as parse_text

from dit_scale.config import TrainConfig
from dit_scale.elastic.launch import NodeLog
from dit_scale.heartbeat import Heart, Phase
from dit_scale.journal import Entry, Event
from dit_scale.monitoring import exporter
from dit_scale.monitoring.exporter import observer
from dit_scale.monitoring.families import ROW, families
from dit_scale.monitoring.follower import Follower, Look, append
from dit_scale.monitoring.tail import Tail
from dit_scale.report.goodput import ledger
from dit_scale.report.interruptions import interruptions
from tests.support.speed import scaled

OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
ROW_OF_A_LOG_POINT = {
    **{gauge.key: 0.5 for gauge in ROW},
    "step": 20,
    "samples": 5120,
    "skipped": 0,
    "slowest_rank": 3,
}


def entry(event: Event, time_s: float, **details: Any) -> Entry:
    return {"event": event.value, "time_s": time_s, "monotonic_s": time_s - 900.0, **details}


JOURNAL = [
    entry(Event.START, 1000.0, attempt=1, step=0, restore_s=1.0),
    entry(Event.FIRST_STEP, 1010.0, attempt=1, step=1, data_s=0.5),
    entry(Event.SKIPPED_STEP, 1015.0, attempt=1, step=7, skipped_step=7),
    entry(Event.LOG, 1020.0, attempt=1, step=10, data_s=1.0),
    entry(Event.CHECKPOINT, 1021.0, attempt=1, step=10, name="0000000010-0001"),
    entry(Event.LOG, 1030.0, attempt=1, step=20, data_s=2.0),
]
SUPERVISOR = [
    entry(Event.JOINED, 990.0, round=1),
    entry(Event.ROUND, 995.0, round=1, nodes=["a", "b"]),
    entry(Event.FIRST_STEP, 1010.0, round=1),
]
FAILED = [
    entry(
        Event.ROUND_ENDED,
        1040.0,
        round=1,
        reason="failed",
        failed_node="b",
        text="a rank failed",
        details={"step": 22},
    ),
    entry(Event.RANKS_GONE, 1041.0, round=1),
    entry(Event.JOINED, 1041.0, round=2),
]


def lines(entries: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(one)}\n" for one in entries)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run that has failed once, with another round to come."""
    run = tmp_path / "run"
    (run / "supervisors").mkdir(parents=True)
    (run / "events.jsonl").write_text(lines(JOURNAL))
    (run / "metrics.jsonl").write_text(lines([ROW_OF_A_LOG_POINT, {"step": 20, "eval_loss": 0.25}]))
    (run / "supervisors/a.jsonl").write_text(lines(SUPERVISOR))
    return TrainConfig(run=str(run), steps=40)


def numbers(text: str) -> dict[str, float]:
    """Return the samples, by name and labels other than run and node."""
    found = {}
    for family in parse_text(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("run", "node")}
            found[sample.name + "".join(f" {labels[name]}" for name in sorted(labels))] = sample.value
    return found


def test_a_tail_reads_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tail = Tail(path, "step")
    assert tail.read() == ([], False)
    path.write_text('{"step": 1}\n{"step"')
    assert tail.read() == ([{"step": 1}], False)
    assert tail.read() == ([], False)
    with path.open("a") as file:
        file.write(': 2}\nnothing\n{"other": 3}\n{"step": 4}\n')
    assert tail.read() == ([{"step": 2}, {"step": 4}], False)
    other = tmp_path / "other"  # as an attempt replaces metrics.jsonl
    other.write_text('{"step": 1}\n{"step": 5}\n')
    other.rename(path)
    assert tail.read() == ([{"step": 1}, {"step": 5}], True)
    path.write_text('{"step": 6}\n')
    assert tail.read() == ([{"step": 6}], True)


def test_a_look_agrees_with_the_files(config: TrainConfig, tmp_path: Path) -> None:
    follower = Follower(config, "a", tmp_path / "beats")
    look = follower.look(1050.0)
    assert (look.state, look.step, look.attempt, look.round, look.nodes) == ("training", 20, 1, 1, 2)
    assert (look.checkpoint_step, look.committed_s, look.stepping_since_s) == (10, 1021.0, 1010.0)
    assert (look.row["loss"], look.evaluation["eval_loss"]) == (0.5, 0.25)
    assert look.events[Event.SKIPPED_STEP] == 1
    assert look.spent == ledger(JOURNAL, {"a": SUPERVISOR}, 1050.0, alive=True)

    with Path(config.run, "supervisors/a.jsonl").open("a") as file:
        file.write(lines(FAILED))
    look = follower.look(1060.0)
    assert look.state == "waiting"
    assert look.interruptions == interruptions(JOURNAL, {"a": SUPERVISOR + FAILED})
    assert [one.reason for one in look.interruptions] == ["failed"]
    assert look.spent == ledger(JOURNAL, {"a": SUPERVISOR + FAILED}, 1060.0)


def test_heartbeats_tell_the_step_between_log_points(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "beats/round-000001"
    folder.mkdir(parents=True)
    follower = Follower(config, "a", tmp_path / "beats")
    starting, training = Heart(0, str(folder)), Heart(1, str(folder))
    starting.beat(Phase.RESTORE, 0)
    assert follower.look(1050.0).step == 20
    training.beat(Phase.COMPUTE, 27)
    assert follower.look(1050.0).step == 27


@given(
    kinds=st.lists(st.sampled_from([Event.LOG] * 6 + [Event.SAVE, Event.CHECKPOINT]), max_size=40),
    resumes=st.integers(0, 3),
)
@settings(deadline=None)
def test_log_points_left_out_change_no_heading(kinds: list[Event], resumes: int) -> None:
    """Random attempts with saves, each resuming from the newest commit, and a failure at the end of each."""
    journal, time_s, committed = list[Entry](), 1000.0, 0
    for attempt in range(1, resumes + 2):
        step, waited_s = committed, 0.0
        journal.append(entry(Event.START, time_s, attempt=attempt, step=step, restore_s=2.0))
        time_s += 5.0
        journal.append(entry(Event.FIRST_STEP, time_s, attempt=attempt, step=step + 1, data_s=0.1))
        saved = committed
        for kind in kinds:
            time_s, step, waited_s = time_s + 10.0, step + 10, waited_s + 1.5
            more: dict[str, Any] = {"attempt": attempt, "step": step}
            if kind == Event.LOG:
                more["data_s"] = waited_s
            elif kind == Event.SAVE:
                more["stall_s"], saved = 2.0, step
            else:
                more["name"], committed = f"{saved:010d}-{attempt:04d}", saved
            journal.append(entry(kind, time_s, **more))
        time_s += 30.0
    thinned = list[Entry]()
    for one in journal:
        append(thinned, one)
    logs = sum(one["event"] == Event.LOG for one in thinned)
    assert logs <= 2 * (len(thinned) - logs)
    expected, found = ledger(journal, {}, time_s), ledger(thinned, {}, time_s)
    assert found.by_name() == pytest.approx(expected.by_name())
    assert interruptions(thinned, {}) == interruptions(journal, {})


def test_every_key_of_a_log_point_is_a_metric(config: TrainConfig, tmp_path: Path) -> None:
    look = Follower(config, "a", tmp_path).look(1050.0)
    by_name = {family.name: family for family in families(look, config, "a")}
    for gauge in ROW:
        name = "_".join(filter(None, ("dit_scale", gauge.name, gauge.unit)))
        expected = ROW_OF_A_LOG_POINT[gauge.key] * gauge.scale
        assert by_name[name].unit == gauge.unit
        assert expected in [sample.value for sample in by_name[name].samples]
        assert all(sample.labels["run"] == config.run for sample in by_name[name].samples)
    assert [sample.labels["quarter"] for sample in by_name["dit_scale_loss_quarter"].samples] == list("0123")


def test_a_row_of_an_earlier_version_and_a_window_without_steps(config: TrainConfig, tmp_path: Path) -> None:
    row = {"step": 5, "loss": None, "grad_norm": None, "images_per_s": 3.0}
    Path(config.run, "metrics.jsonl").write_text(lines([row]))
    look = Follower(config, "a", tmp_path).look(1050.0)
    found = {family.name: family.samples for family in families(look, config, "a")}
    assert "dit_scale_grad_norm" not in found
    assert "dit_scale_mfu_ratio" not in found
    (loss,) = found["dit_scale_loss"]
    assert loss.value != loss.value  # NaN


@contextmanager
def observed(
    config: TrainConfig, tmp_path: Path, port: int | None = None, textfiles: str | None = None
) -> Iterator[NodeLog]:
    log = NodeLog("a", tmp_path / "a.jsonl")
    watch = observer(config, node="a", address="127.0.0.1", port=port, textfiles=textfiles)
    with watch(tmp_path / "beats", log):
        yield log
    log.close()


def scrape(config: TrainConfig, **headers: str) -> tuple[str, str]:
    """Return content type and text from the node that the run's target file names."""
    (group,) = json.loads(Path(config.run, "targets/a.json").read_text())
    request = urllib.request.Request(f"http://{group['targets'][0]}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=scaled(30.0)) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_a_node_serves_both_formats(config: TrainConfig, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with observed(config, tmp_path, port=0):
        kind, text = scrape(config)
        assert kind.startswith("text/plain; version=0.0.4")
        found = numbers(text)
        assert found["dit_scale_step"] == 20
        assert found["dit_scale_target_step"] == 40
        assert found["dit_scale_state training"] == 1
        assert found["dit_scale_skipped_steps_total"] == 1
        assert found["dit_scale_run_info 1 DiT-XL/2 1"] == 1
        assert found["dit_scale_restarts_total failed"] == 0
        kind, text = scrape(config, **OPENMETRICS)
        assert kind.startswith("application/openmetrics-text; version=1.0.0")
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert families["dit_scale_time_seconds"].unit == "seconds"
        assert families["dit_scale_skipped_steps"].type == "counter"
        assert families["dit_scale_state"].type == "stateset"
        assert families["dit_scale_run"].type == "info"
        with Path(config.run, "supervisors/a.jsonl").open("a") as file:
            file.write(lines(FAILED))
        assert numbers(scrape(config)[1])["dit_scale_restarts_total failed"] == 1
    assert not Path(config.run, "targets/a.json").exists()
    assert set(threading.enumerate()) == before


def test_a_port_in_use_costs_an_alarm(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with observed(config, tmp_path, port=port):
            pass
    assert f"ALARM: no metrics are served: port {port}: Address already in use" in capsys.readouterr().out
    assert "Address already in use" in (tmp_path / "a.jsonl").read_text()
    assert not Path(config.run, "targets").exists()


def test_a_file_that_cannot_be_read_costs_one_alarm(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with observed(config, tmp_path, port=0):
        assert numbers(scrape(config)[1])["dit_scale_failed_scrapes_total"] == 0
        journal = Path(config.run, "events.jsonl")
        journal.rename(tmp_path / "kept")
        journal.mkdir()
        for count in (1, 2):
            assert numbers(scrape(config)[1]) == {"dit_scale_failed_scrapes_total": count}
        journal.rmdir()
        (tmp_path / "kept").rename(journal)
        found = numbers(scrape(config)[1])
        assert (found["dit_scale_failed_scrapes_total"], found["dit_scale_step"]) == (2, 20)
    assert capsys.readouterr().out.count("ALARM: the metrics for Prometheus cannot be read") == 1


def test_a_file_server_that_hangs_costs_an_alarm(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The journal is a pipe without a writer: opening it takes until the end of the test."""
    look, is_looking = Follower.look, threading.Event()

    def look_and_tell(self: Follower, now_s: float) -> Look:
        is_looking.set()
        return look(self, now_s)

    monkeypatch.setattr(Follower, "look", look_and_tell)
    monkeypatch.setattr(exporter, "TURN_S", 0.2)
    journal = Path(config.run, "events.jsonl")
    journal.unlink()
    os.mkfifo(journal)
    with observed(config, tmp_path, port=0):
        held_up = threading.Thread(target=scrape, args=[config])
        held_up.start()
        assert is_looking.wait(scaled(30.0))
        assert numbers(scrape(config)[1]) == {"dit_scale_failed_scrapes_total": 1}
        journal.write_text("")
        held_up.join()
    assert capsys.readouterr().out.count("ALARM") == 1


def test_a_textfile_is_replaced_and_deleted_in_the_end(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporter, "EVERY_S", 0.05)
    folder = tmp_path / "textfiles"
    with observed(config, tmp_path, textfiles=str(folder)):
        wait_for(lambda: "ALARM" in capsys.readouterr().out)
        folder.mkdir()
        wait_for(lambda: any(folder.glob("*.prom")))
        (path,) = folder.glob("*.prom")
        assert path.name.startswith("dit-scale-a-")
        assert numbers(path.read_text())["dit_scale_state training"] == 1
        with Path(config.run, "supervisors/a.jsonl").open("a") as file:
            file.write(lines(FAILED))
        wait_for(lambda: numbers(path.read_text())["dit_scale_state waiting"] == 1)
    assert list(folder.iterdir()) == []


def wait_for(is_so: Any) -> None:
    event = threading.Event()
    for _ in range(int(scaled(30.0) / 0.02)):
        if is_so():
            return
        event.wait(0.02)
    raise AssertionError("not within the time")
