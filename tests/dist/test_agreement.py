"""All ranks resume from the same checkpoint, even when they do not see the same files."""

import os
from pathlib import Path

import pytest
import torch

from dit_scale import dist
from dit_scale.checkpoint.manifest import CheckpointId
from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import EngineConfig, TrainConfig
from dit_scale.errors import CheckpointError, ConfigError
from dit_scale.storage import open_storage
from dit_scale.train.restore import find_checkpoint
from tests.support import checkpoints
from tests.support.ranks.processes import run

pytestmark = pytest.mark.dist

NEWEST, OLDER = (CheckpointId(step, 1) for step in (40, 30))
WORLD, SIZE = 2, 6


def found_in(folders: tuple[Path, ...]) -> tuple[str, list[str]]:
    """Return the checkpoint that this rank finds in its own folder, or the error, and its log lines."""
    notes: list[str] = []
    world = dist.start(EngineConfig(device="cpu"))
    config = TrainConfig(run=str(folders[int(os.environ["RANK"])]))
    try:
        found = find_checkpoint(
            config, "1" * 64, world, lambda found: found.read(MASTER, "w", 0, SIZE), notes.append
        )
        return found.id if found else "none", [note for note in notes if not note.startswith("run: ")]
    except CheckpointError as error:
        return str(error), notes
    finally:
        dist.stop()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, ...]:
    """One folder per rank, each with the same two checkpoints."""
    folders = tuple(tmp_path / f"seen by rank {rank}" for rank in range(WORLD))
    for folder in folders:
        for checkpoint_id in (NEWEST, OLDER):
            write(folder, checkpoint_id)
    return folders


def write(folder: Path, checkpoint_id: CheckpointId, **fields: object) -> None:
    owned = [Partition({MASTER: torch.zeros(SIZE)}, (ParameterSlice("w", 0, SIZE, 0),))]
    checkpoints.write(open_storage(folder), checkpoint_id, [owned], **fields)


def test_all_ranks_skip_what_one_cannot_read(folders: tuple[Path, ...]) -> None:
    assert run(WORLD, found_in, folders) == [(NEWEST, [])] * WORLD
    os.truncate(folders[1] / NEWEST.path() / "rank-00000.safetensors", 100)
    for found, notes in run(WORLD, found_in, folders):
        assert found == OLDER
        assert [note.startswith(f"skipping checkpoint {NEWEST.path()}: ") for note in notes] == [True]


@pytest.mark.parametrize("rank", range(WORLD))
def test_different_checkpoints_under_one_name_are_an_error(folders: tuple[Path, ...], rank: int) -> None:
    open_storage(folders[rank]).delete(f"{NEWEST.path()}/MANIFEST.json")
    write(folders[rank], NEWEST, skipped_steps=(7,))
    for message, notes in run(WORLD, found_in, folders):
        assert f"{NEWEST.path()}: the ranks read different manifests under this name" in message
        assert notes == []


def sees(digests: tuple[str, ...]) -> str:
    """Return the error that a rank reports when it sees its own data set."""
    world = dist.start(EngineConfig(device="cpu"))
    try:
        find_checkpoint(TrainConfig(), digests[int(os.environ["RANK"])], world, print, print)
        return ""
    except ConfigError as error:
        return str(error)
    finally:
        dist.stop()


def test_different_data_sets_under_one_path_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(WORLD, sees, ("1" * 64, "1" * 64)) == [""] * WORLD
    for said in run(WORLD, sees, ("1" * 64, "2" * 64)):
        assert said.startswith("data.url=data/imagenet256 is not the same latent data set on all ranks")
