"""`dit-scale compare`: what differs between runs, from their files."""

import json
from pathlib import Path
from typing import Any

import pytest

from dit_scale import cli
from dit_scale.config import TrainConfig, dump
from dit_scale.report.comparison import common_points, compare, configuration_differences
from tests.support.written_runs import NOW_S, TRAINING, lines, write, write_run


def config(**keys: Any) -> TrainConfig:
    return TrainConfig.model_validate(keys)


def run_with(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> str:
    """Write a run of 30 steps with these rows of its record and keys of its configuration."""
    run = write_run(folder, TRAINING, [])
    batch = keys.setdefault("global_batch", 4)
    write(folder / "config.yaml", dump(config(run=run, steps=100, **keys)))
    write(folder / "metrics.jsonl", lines([{"samples": batch * row["step"], **row} for row in rows]))
    return run


def test_configurations_differ_by_dotted_keys() -> None:
    ema = [{"name": "paper", "decay": 0.9999}, {"name": "short", "decay": 0.99}]
    found = configuration_differences(
        [config(run="/a", optimizer={"lr": 1e-4}), config(run="/b", optimizer={"lr": 2e-4}, ema=ema)]
    )
    assert found == {
        "optimizer.lr": [1e-4, 2e-4],
        "ema.1.name": [None, "short"],
        "ema.1.decay": [None, 0.99],
    }


def test_only_numbers_that_all_runs_recorded_are_compared() -> None:
    records = [
        [{"step": 10, "loss": 0.5}, {"step": 20, "loss": None}, {"step": 30, "loss": 0.3}],
        [{"step": 10, "loss": 0.4}, {"step": 20, "loss": 0.4}, {"step": 25}, {"step": 30, "loss": 0.2}],
    ]
    assert common_points(records, "loss", "step") == {10: [0.5, 0.4], 30: [0.3, 0.2]}
    assert common_points(records, "lr", "step") == {}


def test_runs_with_other_batches_meet_at_the_same_samples(tmp_path: Path) -> None:
    small = [{"step": step, "loss": 1 / step, "images_per_s": 8.0} for step in (10, 20, 30)]
    large = [{"step": step, "loss": 2 / step, "images_per_s": 16.0} for step in (5, 10, 20)]
    runs = [run_with(tmp_path / "a", small), run_with(tmp_path / "b", large, global_batch=8)]
    found = compare(runs, NOW_S)
    assert found.clock == "samples"
    assert found.configuration == {"global_batch": [4, 8]}
    assert found.common["loss"] == {40: [0.1, 0.4], 80: [0.05, 0.2]}
    assert found.end["samples"] == [120, 160]


def test_text_and_json_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": step, "loss": 0.2, "images_per_s": 8.0} for step in range(1, 31)]
    better = [row | {"loss": 0.1} for row in rows] + [{"step": 30, "eval_frechet": 9.5, "eval_mse_raw": 0.1}]
    one = run_with(tmp_path / "one", rows)
    other = run_with(tmp_path / "other", better, optimizer={"lr": 2e-4})
    assert cli.main(["compare", one, other, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["configuration"] == {"optimizer.lr": [1e-4, 2e-4]}
    assert tree["common"]["loss"] == {str(step): [0.2, 0.1] for step in range(1, 31)}
    assert "eval_frechet" not in tree["common"]
    assert tree["end"]["eval_frechet"] == [None, 9.5]
    assert tree["end"]["goodput"][0] > 0
    assert cli.main(["compare", one, other]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["configuration", "one", "other"] in shown
    assert ["optimizer.lr", "0.0001", "0.0002"] in shown
    assert ["loss", "1", "0.2", "0.1", "(-50.0%)"] in shown
    assert ["30", "0.2", "0.1", "(-50.0%)"] in shown
    assert ["eval_frechet", "-", "9.5"] in shown
    assert not any("eval_mse_raw" in words for words in shown)


def test_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that has only started has no log point to compare."""
    runs = [run_with(tmp_path / name, []) for name in ("a", "b", "c")]
    assert cli.main(["compare", *runs]) == 0
    printed = capsys.readouterr().out
    assert "the configurations are equal" in printed
    assert "the runs have no log point in common" in printed


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", run_with(tmp_path / "a", []), str(tmp_path)]) == 2
    assert f"{tmp_path}: expected a run folder" in capsys.readouterr().err
