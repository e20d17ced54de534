"""What `dit-scale replay` prints, for people and for machines."""

import json
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from dit_scale import cli
from dit_scale.checkpoint.attempts import AttemptRecord
from dit_scale.cli.replay import text, tree
from dit_scale.report.history import RecordedStep, StepHistory
from dit_scale.report.replay import Replay, ReplayedSample
from dit_scale.telemetry.meters import StepRow

GOOD: StepRow = (1.0, 0.75, 0.25, 2.0, 0.0)
SAMPLES = (
    ReplayedSample(9, 4, 3, False, 612, nan, nan, inf),
    ReplayedSample(8, 5, 2, True, 20, 1.5, 1.25, 0.25),
)


def replay_of(row: StepRow = GOOD, recorded: StepRow | None = GOOD, **history: Any) -> Replay:
    where = None if recorded is None else RecordedStep(recorded, "metrics.jsonl")
    known: dict[str, Any] = {"quarantined": (), "world": 2, "rolled_back": (), **history}
    return Replay(
        "runs/a", 7, StepHistory(AttemptRecord(3), 6, where, **known), "checkpoints/x", 2, row, SAMPLES
    )


def test_for_machines() -> None:
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


def test_for_people() -> None:
    first, row, compared, empty, header, *samples = text(replay_of(), count=20).splitlines()
    assert first == "step 7 of runs/a, attempt 3"
    assert row == "loss 1  mse 0.75  vb 0.25  grad_norm 2"
    assert compared == "processes: 2, of the run: 2; equal to the bit to what metrics.jsonl says"
    assert not empty
    assert header.split() == ["position", "sample", "label", "used", "t", "loss", "mse", "vb"]
    assert samples[0].split() == ["9", "4", "3", "3", "612", "nan", "nan", "inf", "not", "finite"]
    assert samples[1].split() == ["8", "5", "2", "none", "20", "1.5", "1.25", "0.25"]


def test_the_first_of_many() -> None:
    assert (
        text(replay_of(), count=1).splitlines()[-1] == "1 of 2 samples, worst first; --all shows the others"
    )
    assert len(tree(replay_of(), count=1)["samples"]) == 1
    assert tree(replay_of(), count=1)["num_samples"] == 2


@pytest.mark.parametrize(
    ("row", "recorded", "said", "differences"),
    [
        (GOOD, None, "the run wrote down nothing of this step alone", None),
        ((nan, *GOOD[1:]), (nan, *GOOD[1:]), "equal to the bit", {}),
        (GOOD, (1.0, 0.5, 0.25, 2.0, 0.0), "says: mse 5.0e-01", {"mse": 0.5}),
        ((nan, *GOOD[1:]), GOOD, "says: loss inf", {"loss": "inf"}),
    ],
)
def test_compared_with_the_record(
    row: StepRow, recorded: StepRow | None, said: str, differences: dict[str, Any] | None
) -> None:
    found = replay_of(row, recorded)
    assert said in text(found, count=1)
    assert tree(found, count=1)["differences"] == differences


def test_what_the_journal_does_not_say() -> None:
    printed = text(replay_of(world=None, rolled_back=(1, 2)), count=1)
    assert "processes: 2, of the run: unknown;" in printed
    for attempt in (1, 2):
        assert f"attempt {attempt} failed at this step and was rolled back: --attempt {attempt}" in printed


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(tmp_path), "--step", "1"]) == cli.USER_ERROR_EXIT_CODE
    said = f"dit-scale replay: {tmp_path}: expected a run's folder, with its config.yaml\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["x"], "required: --step"), (["x", "--step", "0"], "--step: expected an integer from 1")],
)
def test_arguments_of_the_wrong_kind(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["replay", *arguments])
    assert left.value.code == cli.USER_ERROR_EXIT_CODE
    assert said in capsys.readouterr().err
