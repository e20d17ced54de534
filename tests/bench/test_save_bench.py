"""The checkpoint benchmark runs and its figures are consistent; speed is not tested."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.save_resume import share_of
from benchmarks.savers import OTHERS, OURS, Others
from dit_scale.checkpoint.manifest import CheckpointId
from dit_scale.checkpoint.partition import EXP_AVG, MASTER, Partition
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import ModelConfig
from dit_scale.models.zoo import num_parameters, shape_of
from dit_scale.storage import open_storage
from tests.support import checkpoints
from tests.support.speed import scaled

MODULE = "benchmarks.save"
COPIES = 4
"""Master weights, two moments, one moving average."""
VALUES = {kind: torch.arange(10.0) + first for kind, first in ((MASTER, 1), (EXP_AVG, 100))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", MODULE, "--smoke", "--json", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(300.0), check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint, of two parameters."""
    slices = (ParameterSlice("a", 0, 7, 0), ParameterSlice("b", 0, 3, 7))
    owned = [Partition(dict(VALUES), slices)]
    checkpoints.write(open_storage(tmp_path / "run"), CheckpointId(1, 1), [owned])
    return tmp_path / "run"


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of one process, as `async_save` needs."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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


def test_every_method_saves_and_loads(rows: list[dict[str, Any]]) -> None:
    methods = [row for row in rows if row["what"] == "method"]
    assert [row["method"] for row in methods] == [OURS, *OTHERS]
    for row in methods:
        assert 0 < row["stall_s"] < row["durable_s"]
        assert row["durable_bytes_per_s"] == pytest.approx(row["state_bytes"] / row["durable_s"])
        assert min(row["cpu_s"], row["load_s"], row["load_cached_s"]) > 0


@pytest.mark.parametrize("method", OTHERS)
def test_the_others_load_what_they_saved(method: str, run: Path, tmp_path: Path, process_group: None) -> None:
    """The first state is that of a checkpoint of ours; a later save holds later values."""
    others = Others(run, torch.device("cpu"))
    for turn in range(2):
        saved = {kind: {"a": flat[:7] * 2**turn, "b": flat[7:] * 2**turn} for kind, flat in VALUES.items()}
        torch.testing.assert_close(others.state, saved, rtol=0, atol=0)
        others.save(method, tmp_path / str(turn))
        for tensors in others.state.values():
            for tensor in tensors.values():
                tensor.zero_()
        others.load(method, tmp_path / str(turn))
        torch.testing.assert_close(others.state, saved, rtol=0, atol=0)
        for tensors in others.state.values():
            for tensor in tensors.values():
                tensor.mul_(2)


@pytest.mark.parametrize("method", OTHERS[:2])
def test_the_others_load_a_flipped_bit(method: str, run: Path, tmp_path: Path, process_group: None) -> None:
    """docs/performance.md says so; ours refuses it (tests/unit/test_checkpoint.py)."""
    others, path = Others(run, torch.device("cpu")), tmp_path / "saved"
    others.save(method, path)
    whole = others.state[MASTER]["a"].clone()
    file = path / "__0_0.distcp" if path.is_dir() else path
    content = bytearray(file.read_bytes())
    content[content.index(whole.numpy().tobytes())] ^= 1
    file.write_bytes(content)
    others.load(method, path)
    assert (others.state[MASTER]["a"] != whole).sum() == 1


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
    assert len(rows) == 7 + len((OURS, *OTHERS))
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
