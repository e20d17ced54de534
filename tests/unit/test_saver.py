"""The rank's side of a save: a failed writer fails the save, not the run."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_scale.checkpoint import saver as savers
from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import CHECKPOINTS, CheckpointId, Manifest
from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.saver import Saver, SaveResult
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import CheckpointConfig
from dit_scale.dist import World
from dit_scale.storage import open_storage


def id_of(step: int) -> CheckpointId:
    return CheckpointId(step, attempt=1)


CHECKPOINT = id_of(3)
FOLDERS = {CHECKPOINTS: (MASTER,)}


def partition() -> Partition:
    return Partition({MASTER: torch.arange(6.0)}, (ParameterSlice("w", 0, 6, 0),))


def manifest(step: int = 3) -> Manifest:
    return Manifest(
        step=step,
        samples=24,
        attempt=1,
        config={},
        data_sha256="d",
        vae_sha256="v",
        model_shapes={"w": (6,)},
        optimizer_groups=(),
    )


def saved(saver: Saver, step: int = 3) -> SaveResult:
    saver.begin(manifest(step), FOLDERS)
    result = saver.wait()
    assert result is not None
    return result


def test_a_save_holds_the_state_at_its_start(world: World, tmp_path: Path) -> None:
    owned = partition()
    saver = Saver(world, str(tmp_path), [owned], CheckpointConfig())
    saver.begin(manifest(), FOLDERS)
    owned.buffers[MASTER].fill_(-1)  # training continues
    result = saver.wait()
    assert result is not None
    assert (result.problem, result.dropped) == ("", ())
    root = open_storage(tmp_path)
    assert committed(root) == [CHECKPOINT]
    assert Checkpoint(root, CHECKPOINT).read(MASTER, "w", 0, 6).tolist() == [0, 1, 2, 3, 4, 5]
    saver.close()


def test_retention_keeps_what_the_configuration_says(world: World, tmp_path: Path) -> None:
    config = CheckpointConfig(keep=2, keep_every_steps=9)
    saver = Saver(world, str(tmp_path), [partition()], config)
    dropped: list[str] = []
    for step in range(3, 22, 3):
        saver.begin(manifest(step), FOLDERS)
        result = saver.wait()
        assert result is not None
        dropped += result.dropped
    assert committed(open_storage(tmp_path)) == [id_of(step) for step in (21, 18, 9)]
    assert dropped == [id_of(step).path() for step in (3, 6, 12, 15)]
    saver.close()


def test_a_snapshot_has_room_for_every_element_in_fp32(world: World, tmp_path: Path) -> None:
    owned = [partition(), partition()]
    elements = sum(buffer.numel() for part in owned for buffer in part.buffers.values())
    saver = Saver(world, str(tmp_path), owned, CheckpointConfig())
    assert saver.snapshot.bytes == 4 * elements > 0
    saver.close()


def test_a_checkpoint_carries_the_record(world: World, tmp_path: Path) -> None:
    record = tmp_path / "run" / "metrics.jsonl"
    record.parent.mkdir()
    record.write_text('{"step": 3}\n')
    saver = Saver(world, str(tmp_path / "root"), [partition()], CheckpointConfig(), [record])
    assert saved(saver).problem == ""
    (first,) = committed(open_storage(tmp_path / "root"))
    assert (tmp_path / "root" / first.path() / "metrics.jsonl").read_text() == '{"step": 3}\n'
    record.unlink()
    assert saved(saver, 6).problem == ""
    (second,) = {*committed(open_storage(tmp_path / "root"))} - {first}
    assert not (tmp_path / "root" / second.path() / "metrics.jsonl").exists()
    saver.close()


def test_a_rank_without_a_save_is_not_busy(world: World, tmp_path: Path) -> None:
    saver = Saver(world, str(tmp_path), [partition()], CheckpointConfig())
    assert saver.flags() == (False, False)
    assert saved(saver).problem == ""
    assert saver.flags() == (False, False)
    saver.close()


def test_a_rank_votes_without_waiting_for_its_writer(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits_s: list[float] = []
    select = savers.select.select

    def recording(read: Any, write: Any, other: Any, timeout_s: float) -> Any:
        waits_s.append(timeout_s)
        return select(read, write, other, timeout_s)

    monkeypatch.setattr(savers.select, "select", recording)
    saver = Saver(world, str(tmp_path), [partition()], CheckpointConfig())
    assert saved(saver).problem == ""
    assert set(waits_s) == {0}
    saver.close()


def test_a_writer_that_died_before_the_request_fails_only_the_save(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(savers, "WRITER", (sys.executable, "-c", "input(); raise SystemExit(7)"))
        saver = Saver(world, str(tmp_path), [partition()], CheckpointConfig())
        assert saver._writer is not None
        os.waitid(os.P_PID, saver._writer.pid, os.WEXITED | os.WNOWAIT)
        assert saved(saver).problem == (
            "rank 0: its writer process exited with 7; the next save starts a new one"
        )
    assert saved(saver).problem == ""
    saver.close()


@pytest.mark.parametrize("lives_s", [0, 0.5])
def test_a_writer_that_does_not_start_fails_only_the_save(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives_s: float
) -> None:
    with monkeypatch.context() as patch:
        command = (sys.executable, "-c", f"import time; time.sleep({lives_s}); raise SystemExit(7)")
        patch.setattr(savers, "WRITER", command)
        saver = Saver(world, str(tmp_path), [partition()], CheckpointConfig())
        for _ in range(2):
            assert "its writer process exited with 7" in saved(saver).problem
            time.sleep(0.1)
    assert saved(saver).problem == ""
    assert committed(open_storage(tmp_path)) == [CHECKPOINT]
    saver.close()


def test_a_save_fails_at_its_deadline(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(savers, "WRITER", (sys.executable, "-c", "import time; time.sleep(1000)"))
        saver = Saver(world, str(tmp_path), [partition()], CheckpointConfig(deadline_s=0.2))
        assert saved(saver).problem == "rank 0: not written within checkpoint.deadline_s=0.2"
    saver.close()


def test_a_name_taken_by_another_process_is_not_overwritten(world: World, tmp_path: Path) -> None:
    """The result is final: a retry under the same name would fail again, but the next step has a new name."""
    theirs = Saver(world, str(tmp_path), [partition()], CheckpointConfig())
    assert saved(theirs).problem == ""
    theirs.close()
    before = {path: path.read_bytes() for path in (tmp_path / CHECKPOINT.path()).iterdir()}
    ours = partition()
    saver = Saver(world, str(tmp_path), [ours], CheckpointConfig())
    assert (saved(saver).problem, saved(saver).is_final) == ("", False), "the same one again is ours"
    ours.buffers[MASTER].fill_(-1)
    result = saved(saver)
    assert result.is_final
    assert result.problem.startswith(f"rank 0: {tmp_path}/{CHECKPOINT.path()} has a manifest already")
    assert {path: path.read_bytes() for path in (tmp_path / CHECKPOINT.path()).iterdir()} == before
    saver.begin(manifest(6), FOLDERS)
    result = saver.wait()
    assert result is not None
    assert (result.problem, result.is_final) == ("", False)
    saver.close()
