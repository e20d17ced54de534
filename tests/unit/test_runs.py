"""`dit-scale runs`: which folders are runs, in which order, and what is said about each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit_scale import cli
from dit_scale.report.runs import MAX_DEPTH, find_runs, list_runs
from dit_scale.report.status import status_of
from tests.support.ranks.terminal import Terminal
from tests.support.written_runs import NOW_S, TRAINING, event, lines, write, write_run


def found_in(folder: Path) -> list[str]:
    problems: list[OSError] = []
    found = [str(path.relative_to(folder)) for path in find_runs(folder, problems.append)]
    assert problems == []
    return found


def test_runs_are_found_at_any_depth_up_to_a_limit(tmp_path: Path) -> None:
    deepest = "/".join("abcd"[:MAX_DEPTH])
    for name in ("b", "study/runs/x", deepest, f"{deepest}e/f", "b/inside", ".hidden"):
        write_run(tmp_path / name, TRAINING, [])
    write(tmp_path / "latents" / "metrics.jsonl", "{}\n")  # an encoding job writes one as well
    write(tmp_path / "new" / "supervisors" / "node0.jsonl", lines([event(1.0, "joined", round=1)]))
    assert found_in(tmp_path) == [deepest, "b", "new", "study/runs/x"]
    assert found_in(tmp_path / "b") == ["."]


def test_links_lead_to_runs_but_not_twice(tmp_path: Path) -> None:
    write_run(tmp_path / "scratch" / "x", TRAINING, [])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").symlink_to(tmp_path / "scratch" / "x")
    (tmp_path / "runs" / "latest").symlink_to("x")
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    assert found_in(tmp_path / "runs") == ["latest"]


def test_the_last_written_run_is_first_and_each_is_as_its_status(tmp_path: Path) -> None:
    done = [*TRAINING, event(1050.0, "done", attempt=1, step=100)]
    write_run(tmp_path / "a", done, [], silence_s=500.0)
    write_run(tmp_path / "b", TRAINING, [], silence_s=5.0)
    found = list_runs(str(tmp_path), NOW_S)
    assert found.problems == {}
    assert [(one.run, one.state) for one in found.runs] == [
        (str(tmp_path / "b"), "running"),
        (str(tmp_path / "a"), "finished"),
    ]
    assert found.runs == [status_of(one.run, NOW_S) for one in found.runs]


def test_a_run_that_cannot_be_read_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "good", TRAINING, [])
    write_run(tmp_path / "newer", TRAINING, [])
    write(tmp_path / "newer" / "config.yaml", "a_key_of_a_later_version: 1\n")
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert [one["run"] for one in tree["runs"]] == [str(tmp_path / "good")]
    assert "unknown key 'a_key_of_a_later_version'" in tree["problems"][str(tmp_path / "newer")]
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert f"{tmp_path / 'newer'}: " in capsys.readouterr().out


def test_no_server_is_asked_for_a_checkpoint_on_s3(tmp_path: Path) -> None:
    """A listing must not wait for the servers of a hundred runs; boto3 is not even imported."""
    write_run(tmp_path, TRAINING, [])
    text = (tmp_path / "config.yaml").read_text()
    write(tmp_path / "config.yaml", text.replace("  url: ''\n", "  url: s3://bucket/run\n"))
    code = (
        f"import sys; from dit_scale.report.runs import list_runs; (one,) = list_runs({str(tmp_path)!r}, "
        f"{NOW_S}).runs; print(one.step, one.checkpoint, {{'boto3', 'torch'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "30  set()\n"


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "[red]", TRAINING, [])
    write(
        tmp_path / "[red]" / "metrics.jsonl",
        lines([{"step": 20, "images_per_s": 8.0}, {"step": 20, "eval_mse_raw": 0.1, "eval_loss_raw": 0.25}])
        + lines([{"step": 30, "images_per_s": 16.0}]),
    )
    os.utime(run)
    assert cli.main(["runs", str(tmp_path)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "[red]" in line).split()
    assert row[:4] == ["[red]", "DiT-XL/2", "running", "30/100"]
    assert row[4:7] == ["16.0", "loss_raw", "0.25"]
    assert row[-1] == "s"


@pytest.mark.parametrize(("columns", "shown"), [(40, False), (100, True)])
def test_a_narrow_terminal_shows_fewer_columns_and_complete_cells(
    tmp_path: Path, columns: int, shown: bool
) -> None:
    write_run(tmp_path / "a_long_name", TRAINING, [])
    command = [sys.executable, "-m", "dit_scale.cli", "runs", str(tmp_path)]
    terminal = Terminal(["env", f"COLUMNS={columns}", *command])
    assert terminal.process.wait(60) == 0
    row = next(line for line in terminal.read().splitlines() if "a_long_name" in line).split()
    terminal.close()
    assert row[0] == "a_long_name"
    assert "30/100" in row
    assert ("DiT-XL/2" in row) == shown


def test_a_folder_without_runs_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert f"no runs in {tmp_path} yet" in capsys.readouterr().out
    assert cli.main(["runs", str(tmp_path / "nothing")]) == 2
    assert "is not a folder; pass the folder that contains your runs" in capsys.readouterr().err
