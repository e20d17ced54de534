"""Retention: what it keeps, in which order it deletes the rest, and which attempts may delete."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_scale.checkpoint import attempts, retention, writer
from dit_scale.checkpoint.attempts import AttemptRecord, committed
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, MANIFEST, CheckpointId
from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.retention import Rule
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.errors import CheckpointError, StorageError, SupersededError
from dit_scale.storage import DiskStorage, Storage, open_storage
from tests.support import checkpoints

RANKS = [
    [Partition({MASTER: torch.arange(4).float()}, (ParameterSlice("w", start, 4, 0),))] for start in (0, 4)
]


def id_of(step: int, attempt: int = 1) -> CheckpointId:
    return CheckpointId(step, attempt)


def path_of(step: int, attempt: int = 1, folder: str = CHECKPOINTS) -> str:
    return CheckpointId(step, attempt).path(folder)


def put(root: Storage, *ids: CheckpointId, folder: str = CHECKPOINTS) -> None:
    """Write checkpoints of two ranks each."""
    for checkpoint_id in ids:
        checkpoints.write(root, checkpoint_id, RANKS, folder)


def start(root: Storage, number: int, resumed_from: CheckpointId | None = None) -> None:
    attempts.claim(root, AttemptRecord(number, resumed_from))


def folders(root: Storage) -> list[str]:
    """Return all folders that are not empty, newest first."""
    return sorted({key.rpartition("/")[0] for key, _ in root.list()} - {"attempts"}, reverse=True)


@pytest.fixture
def deleted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys in the order in which they are deleted."""
    keys: list[str] = []
    delete = DiskStorage.delete

    def recording(self: DiskStorage, key: str) -> None:
        keys.append(key)
        delete(self, key)

    monkeypatch.setattr(DiskStorage, "delete", recording)
    return keys


# What is kept


@pytest.mark.parametrize(
    ("keep", "keep_every_steps", "left"),
    [
        (1, 0, [60]),
        (2, 0, [60, 50]),
        (9, 0, [60, 50, 40, 30, 20, 10]),
        (1, 20, [60, 40, 20]),
        (2, 30, [60, 50, 30]),
        (1, 25, [60, 50, 30]),
        (1, 100, [60]),
        (1, 1, [60, 50, 40, 30, 20, 10]),
    ],
)
def test_the_newest_and_the_first_of_every_window_are_kept(
    root: Storage, keep: int, keep_every_steps: int, left: list[int]
) -> None:
    start(root, 1)
    put(root, *map(id_of, range(10, 70, 10)))
    gone = retention.prune(root, 1, id_of(60), Rule(keep, keep_every_steps))
    assert committed(root) == [id_of(step) for step in left]
    assert folders(root) == [path_of(step) for step in left]
    assert gone == [path_of(step) for step in range(10, 70, 10) if step not in left]
    for step in left:
        Checkpoint(root, id_of(step)).verify()


def test_pruning_often_or_once_keeps_the_same(tmp_path: Path) -> None:
    often, once = open_storage(tmp_path / "often"), open_storage(tmp_path / "once")
    for step in range(7, 130, 7):
        for root in (often, once):
            put(root, id_of(step))
        retention.prune(often, 1, id_of(step), Rule(2, 25))
    retention.prune(once, 1, id_of(126), Rule(2, 25))
    assert committed(often) == committed(once) == [id_of(s) for s in (126, 119, 105, 77, 56, 28)]


def test_tagged_checkpoints_are_kept(root: Storage) -> None:
    start(root, 1)
    put(root, *map(id_of, (10, 20, 30)))
    root.write(f"{path_of(10)}/{retention.TAG}", b"")
    retention.prune(root, 1, id_of(30), Rule(1, 0))
    assert committed(root) == [id_of(30), id_of(10)]
    assert folders(root) == [path_of(30), path_of(10)]


def test_stored_averages_on_the_chain_are_kept(root: Storage) -> None:
    start(root, 1)
    for folder in (EMA, CHECKPOINTS):
        put(root, *map(id_of, (10, 20, 30)), folder=folder)
    start(root, 2, id_of(20))
    put(root, id_of(40, 2), folder=EMA)
    put(root, id_of(40, 2))
    retention.prune(root, 2, id_of(40, 2), Rule(1, 0))
    assert committed(root) == [id_of(40, 2)]
    assert folders(root) == [path_of(40, 2, EMA), path_of(20, 1, EMA), path_of(10, 1, EMA), path_of(40, 2)]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_that_the_run_skipped_is_not_counted(root: Storage, keep: int) -> None:
    """Attempt 2 resumed from step 20 because a file of step 40 of attempt 1 was missing."""
    start(root, 1)
    put(root, *map(id_of, (10, 20, 40)))
    root.delete(f"{path_of(40)}/rank-00000.safetensors")
    start(root, 2, id_of(20))
    put(root, id_of(30, 2))
    retention.prune(root, 2, id_of(30, 2), Rule(keep, 0))
    assert committed(root) == [id_of(30, 2), id_of(20)][:keep]
    put(root, id_of(40, 2), id_of(50, 2))
    retention.prune(root, 2, id_of(50, 2), Rule(keep, 0))
    assert folders(root) == [path_of(50, 2), path_of(40, 2)][:keep]


def test_a_copy_under_another_name_is_not_counted(root: Storage, tmp_path: Path) -> None:
    start(root, 1)
    put(root, *map(id_of, (10, 20, 30, 50)))
    (tmp_path / path_of(10)).rename(tmp_path / path_of(40))
    assert retention.prune(root, 1, id_of(50), Rule(2, 0)) == [path_of(20)]
    assert folders(root) == [path_of(50), path_of(40), path_of(30)]


def test_leftovers_of_killed_saves_are_deleted(root: Storage, tmp_path: Path) -> None:
    """Also partial files of killed writers."""
    start(root, 1)
    for step, folder in ((5, CHECKPOINTS), (5, EMA), (20, CHECKPOINTS)):
        checkpoints.write_rank(root, id_of(step), 0, RANKS[0], folder)
    half = path_of(6), path_of(7, 1, EMA), path_of(10)
    for path in half:
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / f".rank-00000.safetensors.{0:016x}.tmp").write_bytes(b"half")
    put(root, id_of(10))
    root.write("checkpoints/notes/readme", b"a user's")
    root.write(f"checkpoints/backup/{id_of(5)}/{MANIFEST}", b"a user's")
    gone = retention.prune(root, 1, id_of(10), Rule(2, 0))
    assert gone == [path_of(5), path_of(6), path_of(5, 1, EMA), path_of(7, 1, EMA)]
    assert not any((tmp_path / path).exists() for path in gone)
    assert folders(root) == [
        "checkpoints/notes",
        f"checkpoints/backup/{id_of(5)}",
        path_of(20),
        path_of(10),
    ]
    assert root.leftovers() == [f"{path_of(10)}/.rank-00000.safetensors.{0:016x}.tmp"]


# How it is deleted


def test_the_manifest_is_deleted_first(root: Storage, deleted: list[str]) -> None:
    put(root, id_of(10), id_of(20))
    retention.prune(root, 1, id_of(20), Rule(1, 0))
    files = [MANIFEST, "rank-00000.safetensors", "rank-00001.safetensors"]
    assert deleted == [f"{path_of(10)}/{file}" for file in files]


@pytest.mark.parametrize("before_delete", range(6))
def test_a_later_attempt_stops_it_before_the_next_delete(
    root: Storage, deleted: list[str], monkeypatch: pytest.MonkeyPatch, before_delete: int
) -> None:
    """Attempt 2 starts while attempt 1 deletes two checkpoints of three objects each."""
    start(root, 1)
    put(root, *map(id_of, (10, 20, 30)))
    check_current, asked = attempts.check_current, list[Any]()

    def check(*arguments: Any) -> None:
        asked.append(arguments)
        if len(asked) == before_delete + 1:
            start(root, 2, id_of(30))
        check_current(*arguments)

    monkeypatch.setattr(attempts, "check_current", check)
    with pytest.raises(SupersededError, match="attempt 2 of this run has started"):
        retention.prune(root, 1, id_of(30), Rule(1, 0))
    assert len(deleted) == before_delete
    Checkpoint(root, id_of(30)).verify()


@pytest.mark.parametrize("damage", [b"", b"{}"])
def test_nothing_is_deleted_if_the_newest_manifest_is_damaged(root: Storage, damage: bytes) -> None:
    put(root, id_of(10), id_of(20))
    root.write(f"{path_of(20)}/{MANIFEST}", damage)
    with pytest.raises(CheckpointError, match=f"{path_of(20)}/{MANIFEST} is damaged"):
        retention.prune(root, 1, id_of(20), Rule(1, 0))
    Checkpoint(root, id_of(10)).verify()


def test_a_commit_whose_retention_fails_is_a_commit(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    start(root, 1)
    put(root, id_of(10))
    manifest = checkpoints.write(open_storage(Path(root.url) / "elsewhere"), id_of(20), [])
    ranks = enumerate(RANKS)
    files = {CHECKPOINTS: tuple(checkpoints.write_rank(root, id_of(20), *rank) for rank in ranks)}
    request = writer.Commit(files=files, manifest=manifest, rule=Rule(1))

    def refuse(self: DiskStorage, key: str) -> None:
        raise StorageError(f"cannot delete {key}")

    monkeypatch.setattr(DiskStorage, "delete", refuse)
    reply = writer.commit(root, request)
    assert reply == writer.Reply(retention_problem=f"cannot delete {path_of(10)}/{MANIFEST}")
    assert committed(root) == [id_of(20), id_of(10)]


def test_a_commit_whose_retention_meets_a_later_attempt_is_superseded(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempt 2 starts after the manifest is written and before the first delete."""
    start(root, 1)
    put(root, id_of(10))
    manifest = checkpoints.write(open_storage(Path(root.url) / "elsewhere"), id_of(20), [])
    files = {CHECKPOINTS: (checkpoints.write_rank(root, id_of(20), 0, RANKS[0]),)}
    read_manifest = retention.read_manifest

    def begin_then_read(storage: Storage, checkpoint_id: CheckpointId) -> Any:
        start(root, 2, id_of(20))
        return read_manifest(storage, checkpoint_id)

    monkeypatch.setattr(retention, "read_manifest", begin_then_read)
    with pytest.raises(SupersededError, match="attempt 2 of this run has started"):
        writer.commit(root, writer.Commit(files=files, manifest=manifest, rule=Rule(1)))


def test_a_run_can_be_listed_while_it_deletes(root: Storage) -> None:
    """Folders disappear while the reader lists them."""
    put(root, id_of(900))
    done = threading.Event()

    def save_and_delete() -> None:
        for step in range(1, 100):
            root.write(f"{path_of(step)}/rank-00000.safetensors", b"x")
            root.delete(f"{path_of(step)}/rank-00000.safetensors")
        done.set()

    saving = threading.Thread(target=save_and_delete)
    saving.start()
    lists = [committed(root)]
    while not done.is_set():
        lists.append(committed(root))
    saving.join()
    assert lists == [[id_of(900)]] * len(lists)
