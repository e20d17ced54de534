"""Output of `dit-scale replay`: a table, and JSON."""

import json
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from dit_scale import cli
from dit_scale.checkpoint.attempts import AttemptRecord
from dit_scale.cli.replay import show, tree
from dit_scale.report.history import RecordedStep, StepHistory
from dit_scale.report.replay import Replay, ReplayedSample
from dit_scale.telemetry.meters import StepRow

GOOD: StepRow = (1.0, 0.75, 0.25, 2.0, 0.0)
SAMPLES = (
    ReplayedSample(9, 4, label=3, dropped=False, t=612, loss=nan, mse=nan, vb=inf),
    ReplayedSample(8, 5, label=2, dropped=True, t=20, loss=1.5, mse=1.25, vb=0.25),
)


def replay_of(row: StepRow = GOOD, recorded: StepRow | None = GOOD, **history: Any) -> Replay:
    where = None if recorded is None else RecordedStep(recorded, "metrics.jsonl")
    known: dict[str, Any] = {"quarantined": (), "world": 2, "rolled_back": (), **history}
    return Replay(
        run="runs/a",
        step=7,
        history=StepHistory(AttemptRecord(3), 6, where, **known),
        checkpoint="checkpoints/x",
        world=2,
        row=row,
        samples=SAMPLES,
    )


def test_json() -> None:
    bad: StepRow = (nan, nan, inf, inf, 1.0)
    printed = json.dumps(tree(replay_of(bad, bad), count=20), allow_nan=False)
    parsed = json.loads(printed)
    assert (parsed["loss"], parsed["vb"], parsed["skipped"]) == ("nan", "inf", 1.0)
    assert (parsed["recorded"]["where"], parsed["recorded"]["grad_norm"]) == ("metrics.jsonl", "inf")
    assert parsed["differences"] == {}
    assert [sample["finite"] for sample in parsed["samples"]] == [False, True]
    assert parsed["samples"][0]["loss"] == "nan"
    assert parsed["samples"][1] == {
        "position": 8,
        "sample_id": 5,
        "label": 2,
        "dropped": True,
        "t": 20,
        "loss": 1.5,
        "mse": 1.25,
        "vb": 0.25,
        "finite": True,
    }


def shown(capsys: pytest.CaptureFixture[str], result: Replay, count: int = 1) -> list[str]:
    show(result, count)
    return [line for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    first, row, comparison, header, _, *samples = shown(capsys, replay_of(), count=20)
    assert first == "step 7 of runs/a, attempt 3"
    assert row == "loss 1  mse 0.75  vb 0.25  grad_norm 2"
    assert comparison == "world size 2, in the run 2; bit-identical to metrics.jsonl"
    assert header.split() == ["position", "sample", "label", "used", "t", "loss", "mse", "vb"]
    assert samples[0].split() == ["9", "4", "3", "3", "612", "nan", "nan", "inf", "not", "finite"]
    assert samples[1].split() == ["8", "5", "2", "none", "20", "1.5", "1.25", "0.25"]


def test_the_first_of_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, replay_of())[-1] == "1 of 2 samples, worst first; --all shows all of them"
    assert len(tree(replay_of(), count=1)["samples"]) == 1
    assert tree(replay_of(), count=1)["num_samples"] == 2


@pytest.mark.parametrize(
    ("row", "recorded", "comparison", "differences"),
    [
        (GOOD, None, "the run recorded nothing for this step alone", None),
        ((nan, *GOOD[1:]), (nan, *GOOD[1:]), "bit-identical to metrics.jsonl", {}),
        (GOOD, (1.0, 0.5, 0.25, 2.0, 0.0), "metrics.jsonl: mse 5.0e-01", {"mse": 0.5}),
        ((nan, *GOOD[1:]), GOOD, "metrics.jsonl: loss inf", {"loss": "inf"}),
    ],
)
def test_the_comparison_with_the_record(
    row: StepRow,
    recorded: StepRow | None,
    comparison: str,
    differences: dict[str, Any] | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = replay_of(row, recorded)
    assert shown(capsys, result)[2].endswith(comparison)
    assert tree(result, count=1)["differences"] == differences


def test_a_journal_without_the_world_size(capsys: pytest.CaptureFixture[str]) -> None:
    printed = "\n".join(shown(capsys, replay_of(world=None, rolled_back=(1, 2))))
    assert "world size 2, in the run unknown;" in printed
    for attempt in (1, 2):
        assert f"attempt {attempt} failed at this step and was rolled back; see it with" in printed
        assert f"--attempt {attempt}\n" in printed


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(tmp_path), "--step", "1"]) == cli.USER_ERROR_EXIT_CODE
    said = f"dit-scale replay: {tmp_path}: expected a run folder, with its config.yaml\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["x"], "required: --step"), (["x", "--step", "0"], "--step: expected an integer from 1")],
)
def test_arguments_of_the_wrong_kind(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(["replay", *arguments])
    assert exited.value.code == cli.USER_ERROR_EXIT_CODE
    assert message in capsys.readouterr().err
