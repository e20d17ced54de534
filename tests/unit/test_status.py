"""`dit-scale status` on runs that are alive, finished, stopped or dead, and on folders without a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dit_scale import cli
from dit_scale.report.status import Status, status_of
from dit_scale.storage import open_storage
from tests.support.written_runs import CHECKPOINT, NOW_S, TRAINING, event, lines, write, write_run

ROUND = [
    event(1000.0, "round", round=1, nodes=["node0", "node1"]),
    event(1001.0, "ranks_started", round=1),
]
FAILED = [
    event(
        1050.0,
        "round_ended",
        round=1,
        reason="failed",
        failed_node="node1",
        text="rank 3 was killed\nin a second line",
        details={"rank": 3, "step": 38},
    ),
    event(1051.0, "ranks_gone", round=1),
]
AGAIN = [
    event(1060.0, "round", round=2, nodes=["node0"]),
    event(1061.0, "ranks_started", round=2),
]


def state_of(folder: Path, *files: Any, silence_s: float = 1.0) -> Status:
    return status_of(write_run(folder, *files, silence_s=silence_s), NOW_S)


def test_a_run_that_is_training(tmp_path: Path) -> None:
    found = state_of(tmp_path, TRAINING, ROUND)
    assert (found.state, found.text) == ("running", "training")
    assert (found.step, found.steps, found.attempt, found.round) == (30, 100, 1, 1)
    assert (found.steps_per_s, found.eta_s) == (2.0, 35.0)
    assert (found.checkpoint, found.checkpoint_age_s) == (f"checkpoints/{CHECKPOINT}", NOW_S - 1032.0)
    assert found.nodes == ["node0", "node1"]
    assert found.interruptions == []
    assert found.wall_s == sum(found.spent_s.values()) == 1000.0
    assert found.spent_s["productive"] == NOW_S - 1012.0


@pytest.mark.parametrize(("last", "state"), [("done", "finished"), ("waited", "stopped"), ("log", "running")])
def test_an_alarm_does_not_change_the_state(tmp_path: Path, last: str, state: str) -> None:
    """A mirror that fails to finish raises its alarm after the last entry of the run."""
    journal = [*TRAINING, event(1042.0, last, attempt=1, step=30, data_s=0.0)]
    alarm = event(1043.0, "alarm", attempt=1, step=30, text="wandb did not finish")
    without, found = (state_of(tmp_path, events, []) for events in (journal, [*journal, alarm]))
    assert without.state == found.state == state
    assert without.text == found.text
    assert [one.reason for one in without.interruptions] == [one.reason for one in found.interruptions]


def test_a_run_that_was_restarted(tmp_path: Path) -> None:
    found = state_of(tmp_path, TRAINING, [*ROUND, *FAILED, *AGAIN])
    assert (found.state, found.text) == ("running", "starting: launcher and imports")
    assert (found.round, found.nodes, found.eta_s) == (2, ["node0"], None)
    (one,) = found.interruptions
    assert (one.reason, one.node, one.rank, one.step, one.lost_steps) == ("failed", "node1", 3, 38, 18)
    assert found.spent_s["replayed"] == 1050.0 - 1031.0


def test_lost_steps_are_those_taken_again(tmp_path: Path) -> None:
    journal = [*TRAINING, event(1070.0, "start", attempt=2, step=10, restore_s=0.0)]
    (one,) = state_of(tmp_path, journal, [*ROUND, *FAILED, *AGAIN]).interruptions
    assert one.lost_steps == 28


@pytest.mark.parametrize(("journal", "step", "lost"), [(TRAINING, 30, 10), ([], None, 0)])
def test_a_round_whose_supervisors_were_all_killed(
    tmp_path: Path, journal: list[dict[str, Any]], step: int | None, lost: int
) -> None:
    (one,) = state_of(tmp_path, journal, [*ROUND, *AGAIN]).interruptions
    assert (one.reason, one.step, one.lost_steps) == ("gone", step, lost)


def test_a_round_that_took_no_step(tmp_path: Path) -> None:
    (one,) = state_of(tmp_path, [], [*ROUND, *FAILED, *AGAIN]).interruptions
    assert (one.step, one.lost_steps) == (38, 0)


def test_a_run_between_two_rounds_waits_for_missing_nodes(tmp_path: Path) -> None:
    write(tmp_path / "elastic" / "sealed" / "000001.json", "{}")
    write(tmp_path / "elastic" / "join" / "000002" / "node0.json", "{}")
    found = state_of(tmp_path, TRAINING, [*ROUND, *FAILED])
    assert (found.state, found.text) == ("waiting", "for more nodes; joined so far: node0")
    assert found.spent_s["waiting"] == NOW_S - 1051.0


def test_a_renewed_lease_shows_that_a_run_is_alive(tmp_path: Path) -> None:
    run = write_run(tmp_path, TRAINING, ROUND, silence_s=600.0)
    assert status_of(run, NOW_S).state == "silent"
    open_storage(run).write("elastic/leases/node0.json", b"{}")
    os.utime(tmp_path / "elastic" / "leases" / "node0.json", (NOW_S - 5,) * 2)
    found = status_of(run, NOW_S)
    assert (found.state, found.silence_s) == ("running", 5.0)


def test_a_node_that_waits_for_a_round_to_end_does_not_show_that_it_is_alive(tmp_path: Path) -> None:
    run = write_run(tmp_path, TRAINING, ROUND, silence_s=600.0)
    write(tmp_path / "supervisors" / "node7.jsonl", lines([event(1500.0, "joined", round=2)]))
    write(tmp_path / "elastic" / "leases" / "node7.json", "{}")
    for name in ("supervisors/node7.jsonl", "elastic/leases/node7.json"):
        os.utime(tmp_path / name, (NOW_S - 1,) * 2)
    assert (status_of(run, NOW_S).state, status_of(run, NOW_S).silence_s) == ("silent", 600.0)


def test_a_dead_run_reports_how_long_it_has_been_silent(tmp_path: Path) -> None:
    found = state_of(tmp_path, TRAINING, [], silence_s=180.0)
    assert found.state == "silent"
    assert "nothing written for 3 min" in found.text
    assert found.wall_s == 1041.0 - 1010.0
    assert found.spent_s["replayed"] == 1041.0 - 1031.0


def test_a_run_that_rarely_logs_is_not_silent_too_soon(tmp_path: Path) -> None:
    """8 samples a second are 2 steps a second; 10,000 steps between two log points take 5000 s."""
    run = write_run(tmp_path, TRAINING, [], silence_s=600.0)
    config = (tmp_path / "config.yaml").read_text().replace("every_steps: 10\n", "every_steps: 10000\n")
    write(tmp_path / "config.yaml", config)
    os.utime(tmp_path / "config.yaml", (NOW_S - 600,) * 2)
    assert status_of(run, NOW_S).state == "running"


def test_a_finished_run(tmp_path: Path) -> None:
    done = [
        event(1100.0, "waited", attempt=1, step=100, stall_s=1.0),
        event(1100.0, "done", attempt=1, step=100),
    ]
    ended = event(1101.0, "round_ended", round=1, reason="done", failed_node="node0", text="", details={})
    found = state_of(tmp_path, [*TRAINING, *done], [*ROUND, ended], silence_s=9e2)
    assert (found.state, found.step, found.eta_s, found.interruptions) == ("finished", 100, None, [])
    assert found.wall_s == 101.0


@pytest.mark.parametrize("supervised", [True, False])
def test_a_run_that_was_asked_to_stop(tmp_path: Path, supervised: bool) -> None:
    left = [event(1043.0, "waited", attempt=1, step=32, stall_s=1.0)]
    ended = event(1042.0, "round_ended", round=1, reason="leaving", failed_node="node1", text="", details={})
    found = state_of(tmp_path, [*TRAINING, *left], [*ROUND, ended] if supervised else [])
    assert found.state == "stopped"
    assert [one.reason for one in found.interruptions] == ["leaving" if supervised else "stopped"]


def test_a_mistake_needs_manual_intervention(tmp_path: Path) -> None:
    ended = event(1050.0, "round_ended", round=1, reason="mistake", failed_node="n", text="odd", details={})
    found = state_of(tmp_path, [], [*ROUND, ended])
    assert (found.state, found.text) == ("failed", "manual intervention needed: odd")


def test_supervisors_that_gave_up(tmp_path: Path) -> None:
    found = state_of(tmp_path, TRAINING, [*ROUND, *FAILED, event(1052.0, "gave_up", round=1)])
    assert found.state == "failed"
    assert "gave up: rank 3 was killed" in found.text


def test_an_exit_without_a_reason_and_a_rollback(tmp_path: Path) -> None:
    journal = [
        *TRAINING,
        event(1070.0, "start", attempt=2, step=20, restore_s=0.0),
        event(1080.0, "rollback", attempt=2, step=30),
        event(1081.0, "start", attempt=3, step=20, restore_s=0.0),
    ]
    rows = state_of(tmp_path, journal, []).interruptions
    assert [(row.reason, row.step, row.lost_steps) for row in rows] == [
        ("gone", 30, 10),
        ("rollback", 30, 10),
    ]


def test_a_rollback_within_a_round(tmp_path: Path) -> None:
    journal = [
        *TRAINING,
        event(1042.0, "rollback", attempt=1, step=30),
        event(1043.0, "start", attempt=2, step=20, restore_s=0.0),
    ]
    rows = state_of(tmp_path, journal, [*ROUND, *FAILED]).interruptions
    assert [(row.reason, row.step, row.lost_steps) for row in rows] == [
        ("rollback", 30, 10),
        ("failed", 38, 18),
    ]


def test_the_first_round_of_a_run_has_no_configuration_yet(tmp_path: Path) -> None:
    run = write_run(tmp_path, [], ROUND)
    for name in ("config.yaml", "events.jsonl", "metrics.jsonl"):
        (tmp_path / name).unlink()
    found = status_of(run, NOW_S)
    assert (found.state, found.steps, found.step) == ("running", None, 0)


def test_text_and_json_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, TRAINING, [*ROUND, *FAILED])
    assert cli.main(["status", run, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["step"] == 30
    assert tree["interruptions"][0]["lost_steps"] == 18
    assert cli.main(["status", run]) == 0
    text = capsys.readouterr().out
    assert "step        30 of 100" in text
    assert "interruptions: 1, 18 steps lost" in text
    row = next(line for line in text.splitlines() if "node1" in line and "failed" in line)
    assert row.split()[2:7] == ["failed", "node1", "3", "38", "18"]
    assert "second line" not in text
    assert f"goodput {tree['goodput']:.1%}" in text


def test_a_run_whose_steps_were_lowered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, TRAINING, ROUND)
    write(
        tmp_path / "config.yaml", (tmp_path / "config.yaml").read_text().replace("steps: 100\n", "steps: 4\n")
    )
    found = status_of(run, NOW_S)
    assert (found.step, found.steps, found.eta_s) == (30, 4, 0.0)
    assert cli.main(["status", run]) == 0
    assert "step        30, beyond the 4 steps of the current configuration\n" in capsys.readouterr().out


def test_a_step_counts_as_lost_only_if_the_next_attempt_takes_it_again(tmp_path: Path) -> None:
    """The attempt after the next one resumes from further back, which is not the first one's loss."""
    later = [
        event(1070.0, "start", attempt=2, step=20, restore_s=0.0),
        event(1075.0, "first_step", attempt=2, step=21, data_s=0.0),
        event(1080.0, "start", attempt=3, step=10, restore_s=0.0),
    ]
    rows = state_of(tmp_path, [*TRAINING, *later], []).interruptions
    assert [(row.reason, row.step, row.lost_steps) for row in rows] == [("gone", 30, 10), ("gone", 21, 11)]


def test_the_reason_of_a_failure_is_shown_literally(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets and colons in a reason are shown as they are."""
    reason = "[gloo/pair.cc:1] [/red] :cat:"
    ended = event(1050.0, "round_ended", round=1, reason="failed", failed_node="n", text=reason, details={})
    assert cli.main(["status", write_run(tmp_path, TRAINING, [*ROUND, ended])]) == 0
    assert reason in capsys.readouterr().out


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    run = write_run(tmp_path, TRAINING, ROUND)
    command = f"from dit_scale import cli; cli.main(['status', {run!r}])"
    code = f"import sys; {command}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", ["", "nothing"])
def test_a_folder_without_a_run(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(tmp_path / name)]) == 2
    assert "expected a run folder" in capsys.readouterr().err
