"""The campaign from outside in short: one run of each kind, and a check that it would notice a difference."""

import json
from pathlib import Path

import pytest

from tests.chaos.disturbances import DISTURBANCES, Happened
from tests.chaos.outside import Campaign, Shape, differences, new_run
from tests.support.ranks.public_run import record_lines
from tests.support.ranks.runs import final_files


@pytest.mark.dist
@pytest.mark.long
def test_a_run_disturbed_from_outside_gives_the_same_bits(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, seed=3)
    for number in range(len(DISTURBANCES)):
        campaign.try_one(number)
    print(campaign.text())
    assert [trial.problem for trial in campaign.trials] == [""] * len(DISTURBANCES)


@pytest.mark.dist
@pytest.mark.long
def test_a_difference_is_detected(tmp_path: Path) -> None:
    run = new_run(tmp_path, Shape(1, 2))
    assert run.start("ranks").wait() == [0], run.text()
    record, files = record_lines(run), final_files(run.config)
    nothing = Happened("", "")
    assert differences(run, nothing, record, files) == ""
    assert "as expected" in differences(run, nothing, record[:-1], files)
    assert differences(run, nothing, record, [files[0][:-1] + b"?"]) == "the last checkpoint differs"
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[3]) | {"loss": 7.0}
    (run.folder / "metrics.jsonl").write_text("\n".join([*lines[:3], json.dumps(row), *lines[4:]]) + "\n")
    assert "59 are as expected" in differences(run, nothing, record, files)
    with run.log.open("a") as log:
        log.write("Traceback (most recent call last):\n")
    assert differences(run, Happened("", "", run.folder / "metrics.jsonl"), record, files).startswith("a tr")
