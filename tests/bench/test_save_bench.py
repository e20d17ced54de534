"""The checkpoint benchmark runs and its figures are consistent; speed is not tested."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.save import share_of
from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import ModelConfig
from dit_scale.models.zoo import num_parameters, shape_of
from tests.support.speed import scaled

MODULE = "benchmarks.save"
COPIES = 4
"""Master weights, two moments, one moving average."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", MODULE, "--smoke", "--json", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(300.0), check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(rows: list[dict[str, Any]], what: str) -> dict[str, Any]:
    (row,) = (row for row in rows if row["what"] == what)
    return row


def test_the_state_is_all_that_a_checkpoint_holds(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        model = ModelConfig(name=row["model"], image_size=row["image_size"])
        assert row["state_bytes"] == pytest.approx(4 * COPIES * num_parameters(shape_of(model)), rel=1e-4)


def test_the_stall_is_compared_to_a_plain_copy(rows: list[dict[str, Any]]) -> None:
    row = of_kind(rows, "stall")
    for name in ("take", "copy"):
        assert row[f"{name}_bytes_per_s"] == pytest.approx(row["state_bytes"] / row[f"{name}_s"])


def test_steps_with_and_without_a_save(rows: list[dict[str, Any]]) -> None:
    row = of_kind(rows, "step")
    assert row["quiet_s"] > 0
    assert 0 < row["save_s"] < row["beginning_s"]
    assert row["steps_writing"] >= 2, "one until all ranks have written, one until the manifest is written"
    assert row["committed_s"] >= row["save_s"] + row["writing_s"]


def test_a_file_is_written_by_both(rows: list[dict[str, Any]]) -> None:
    row = of_kind(rows, "write")
    assert row["ratio"] == pytest.approx(row["write_bytes_per_s"] / row["dd_bytes_per_s"])
    assert row["write_s"] < row["verified_s"]


def test_a_run_is_resumed_and_read_at_two_world_sizes(rows: list[dict[str, Any]]) -> None:
    resume = of_kind(rows, "resume")
    assert all(resume[name] > 0 for name in ("built_s", "filled_s", "first_batch_s"))
    fills = [row for row in rows if row["what"] == "fill"]
    assert [(row["world"], row["cached"]) for row in fills] == [(1, False), (1, True), (3, True)]
    for row in fills:
        assert row["bytes_per_s"] == pytest.approx(row["state_bytes"] / row["fill_s"])


def test_shares_of_ranks_cover_everything() -> None:
    """Also if a parameter is split twice, and if the last rank owns less."""
    slices = (ParameterSlice("a", 5, 2, 0), ParameterSlice("b", 0, 7, 2), ParameterSlice("c", 3, 1, 9))
    whole = Partition({MASTER: torch.zeros(10)}, slices)
    elements = []
    for rank in range(3):
        (share,) = share_of([whole], rank, 3)
        assert share.buffers[MASTER].numel() == 4
        for e in share.slices:
            elements += [(4 * rank + e.offset + i, e.parameter, e.start + i) for i in range(e.length)]
    assert elements == [(e.offset + i, e.parameter, e.start + i) for e in slices for i in range(e.length)]


def test_settings_and_versions_are_in_each_row(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 7
    for row in rows:
        assert (row["micro_batch"], row["rounds"]) == (2, 1)
        assert row["device"]
        assert row["versions"]["torch"] == torch.__version__


def test_nothing_is_left_behind(rows: list[dict[str, Any]], folder: Path) -> None:
    assert rows
    assert list(folder.iterdir()) == []


def test_a_missing_folder_is_refused() -> None:
    command = [sys.executable, "-m", MODULE, "--smoke", "--folder", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(300.0))
    assert done.returncode == 2
    assert "--folder /nowhere: expected an existing folder" in done.stderr
