"""The chain of attempts: which checkpoints a reader accepts, and which attempts may still write."""

import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.attempts import AttemptRecord, committed
from dit_scale.checkpoint.manifest import ATTEMPTS, CHECKPOINTS, EMA, MANIFEST, CheckpointId, read_manifest
from dit_scale.errors import CheckpointError, SupersededError
from dit_scale.sealed import sealed
from dit_scale.storage import Storage, open_storage
from tests.support import checkpoints


def put(root: Storage, *ids: CheckpointId, folder: str = CHECKPOINTS) -> None:
    """Write manifests that no test opens, like a stale process that called `check_current` long ago."""
    for checkpoint_id in ids:
        root.write(f"{checkpoint_id.path(folder)}/{MANIFEST}", b"")


def claim(root: Storage, number: int, resumed_from: CheckpointId | None = None) -> None:
    attempts.claim(root, AttemptRecord(number, resumed_from))


# Records


def test_a_record_round_trip(root: Storage) -> None:
    assert attempts.numbers(root) == []
    assert attempts.newest(root) is None
    one = AttemptRecord(1)
    two = AttemptRecord(2, CheckpointId(30, 1), ((0, 4), (8, 20)))
    for attempt in (one, two):
        attempts.claim(root, attempt)
    assert attempts.numbers(root) == [1, 2]
    assert attempts.read(root, 1) == one
    assert attempts.newest(root) == attempts.read(root, 2) == two


def test_attempt_numbers_are_unbounded(root: Storage) -> None:
    for number in (9999, 10000):
        claim(root, number)
    root.write(f"{ATTEMPTS}/notes.json", b"a user's")
    assert attempts.numbers(root) == [9999, 10000]
    assert attempts.newest(root) == AttemptRecord(10000)


CLAIMERS, ROUNDS = 3, 20


def claimer(folder: Path, barrier: Barrier, answers: Connection) -> None:
    """One of several processes that repeatedly start the same run at the same moment."""
    root = open_storage(folder)
    for number in range(1, ROUNDS + 1):
        barrier.wait()
        try:
            claim(root, number)
            answers.send("")
        except SupersededError as error:
            answers.send(str(error))


def test_one_of_many_claims_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, pipes = context.Barrier(CLAIMERS), [context.Pipe() for _ in range(CLAIMERS)]
    started = [
        context.Process(target=claimer, args=(tmp_path, barrier, there), daemon=True) for _, there in pipes
    ]
    for process, (_, there) in zip(started, pipes, strict=True):
        process.start()
        there.close()  # so that this process sees EOF when the child exits
    for number in range(1, ROUNDS + 1):
        won, *lost = sorted(here.recv() for here, _ in pipes)
        assert won == ""
        lost_to = f"{tmp_path}: another process has just started attempt {number} of this run"
        assert lost == [lost_to] * (CLAIMERS - 1)
    for process in started:
        process.join()
    assert attempts.newest(open_storage(tmp_path)) == AttemptRecord(ROUNDS)


def test_an_attempt_is_current_until_the_next_one(root: Storage) -> None:
    claim(root, 1)
    attempts.check_current(root, 1)
    claim(root, 2)
    attempts.check_current(root, 2)
    with pytest.raises(SupersededError, match="attempt 2 of this run has started; attempt 1 is superseded"):
        attempts.check_current(root, 1)


# The chain


def test_checkpoints_are_listed_newest_first(root: Storage) -> None:
    put(
        root,
        *(CheckpointId(step, attempt) for step, attempt in ((9, 1), (100, 1), (10, 1), (10, 2), (10, 10000))),
    )
    assert committed(root) == [
        CheckpointId(100, 1),
        CheckpointId(10, 10000),
        CheckpointId(10, 2),
        CheckpointId(10, 1),
        CheckpointId(9, 1),
    ]


def test_other_folders_are_not_listed(root: Storage) -> None:
    name = CheckpointId(10, 1).name
    for path in ("best", f"old/{name}", f"{name}/old"):
        root.write(f"checkpoints/{path}/{MANIFEST}", b"")
    for path in ("checkpoints", f"old/{name}", name):
        root.write(f"{path}/{MANIFEST}", b"")
    root.write(f"{CheckpointId(20, 1).path()}/rank-00000.safetensors", b"")
    assert committed(root) == []


def test_without_records_all_checkpoints_count(root: Storage) -> None:
    ids = [CheckpointId(20, 2), CheckpointId(10, 1)]
    put(root, *ids)
    assert committed(root) == ids


def test_late_commits_of_a_superseded_attempt_do_not_count(root: Storage) -> None:
    claim(root, 1)
    put(root, CheckpointId(10, 1), CheckpointId(20, 1))
    claim(root, 2, CheckpointId(20, 1))
    put(root, CheckpointId(30, 1), CheckpointId(40, 1))
    put(root, CheckpointId(30, 1), folder=EMA)
    assert committed(root) == [CheckpointId(20, 1), CheckpointId(10, 1)]
    put(root, CheckpointId(30, 2))
    put(root, CheckpointId(20, 1), CheckpointId(30, 2), folder=EMA)
    assert committed(root) == [CheckpointId(30, 2), CheckpointId(20, 1), CheckpointId(10, 1)]
    assert committed(root, EMA) == [CheckpointId(30, 2), CheckpointId(20, 1)]


def test_a_checkpoint_that_was_skipped_does_not_count(root: Storage) -> None:
    claim(root, 1)
    put(root, CheckpointId(10, 1), CheckpointId(20, 1))
    claim(root, 2, CheckpointId(10, 1))
    assert committed(root) == [CheckpointId(10, 1)]
    put(root, CheckpointId(20, 2))
    assert committed(root) == [CheckpointId(20, 2), CheckpointId(10, 1)]


def test_an_attempt_that_no_other_resumed_from_is_off_the_chain(root: Storage) -> None:
    claim(root, 1)
    put(root, CheckpointId(10, 1))
    claim(root, 2, CheckpointId(10, 1))
    put(root, CheckpointId(20, 2))
    claim(root, 3, CheckpointId(10, 1))
    assert committed(root) == [CheckpointId(10, 1)]


def test_a_start_from_step_0_has_no_past(root: Storage) -> None:
    claim(root, 1)
    put(root, CheckpointId(10, 1))
    claim(root, 2)
    assert committed(root) == []
    put(root, CheckpointId(5, 2))
    assert committed(root) == [CheckpointId(5, 2)]


def test_a_damaged_record_is_named_and_skipped(root: Storage, tmp_path: Path) -> None:
    claim(root, 1)
    attempts.claim(root, AttemptRecord(2, CheckpointId(10, 1), ((0, 8),)))
    claim(root, 3, CheckpointId(20, 2))
    record = tmp_path / ATTEMPTS / "0003.json"
    record.write_bytes(record.read_bytes().replace(b"20-0002", b"20-0001"))
    with pytest.raises(CheckpointError, match=f"{ATTEMPTS}/0003.json is damaged"):
        attempts.read(root, 3)
    assert attempts.newest(root) == AttemptRecord(2, CheckpointId(10, 1), ((0, 8),))
    assert attempts.numbers(root) == [1, 2, 3], "its number stays taken"


@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_a_damaged_record_invalidates_no_checkpoint(root: Storage, damaged: int) -> None:
    ids = [CheckpointId(30, 3), CheckpointId(20, 2), CheckpointId(10, 1)]
    for number, resumed_from in ((1, None), (2, CheckpointId(10, 1)), (3, CheckpointId(20, 2))):
        claim(root, number, resumed_from)
        put(root, ids[-number])
    root.write(f"{ATTEMPTS}/{damaged:04d}.json", b"")
    assert committed(root) == ids


# Missing records


def save(root: Storage, *ids: CheckpointId, folder: str = CHECKPOINTS) -> None:
    """Commit checkpoints without tensors, as their attempts do."""
    for checkpoint_id in ids:
        checkpoints.write(root, checkpoint_id, [], folder)


def test_the_newest_record_is_missing(root: Storage) -> None:
    claim(root, 1)
    save(root, CheckpointId(10, 1), CheckpointId(20, 1))
    claim(root, 2, CheckpointId(10, 1))
    save(root, CheckpointId(15, 2))
    root.delete(f"{ATTEMPTS}/0002.json")
    assert attempts.numbers(root) == [1, 2], "its folder says that the number is taken"
    assert attempts.unrecorded(root) == [2]
    assert attempts.newest(root) == AttemptRecord(1)
    assert committed(root) == [CheckpointId(15, 2), CheckpointId(10, 1)], "20 was left behind"
    (problem,) = attempts.problems(root)
    assert problem.startswith(
        f"{root.url}/attempts/0002.json is missing; all readable checkpoints of attempt 2 count"
    )
    claim(root, 3, CheckpointId(15, 2))
    save(root, CheckpointId(16, 3))
    assert committed(root) == [CheckpointId(16, 3), CheckpointId(15, 2), CheckpointId(10, 1)]


def test_a_stored_average_without_a_checkpoint_takes_its_number(root: Storage) -> None:
    claim(root, 1)
    save(root, CheckpointId(10, 2), folder=EMA)
    assert attempts.numbers(root) == [1, 2]


def test_all_records_are_missing(root: Storage) -> None:
    save(root, CheckpointId(10, 1), CheckpointId(20, 3))
    assert attempts.numbers(root) == [1, 3]
    assert attempts.unrecorded(root) == attempts.problems(root) == []
    claim(root, 4, CheckpointId(20, 3))
    assert committed(root) == [CheckpointId(20, 3), CheckpointId(10, 1)]


def test_an_attempt_without_record_and_checkpoints(root: Storage) -> None:
    """Attempt 3 resumed from attempt 2, whose record and checkpoints are missing."""
    claim(root, 1)
    save(root, CheckpointId(10, 1))
    claim(root, 3, CheckpointId(20, 2))
    assert committed(root) == [CheckpointId(10, 1)]


def test_gaps_in_the_numbers_do_not_admit_superseded_attempts(root: Storage) -> None:
    claim(root, 1)
    claim(root, 4)
    with pytest.raises(SupersededError, match="attempt 4 of this run has started; attempt 1 is superseded"):
        attempts.check_current(root, 1)
    with pytest.raises(SupersededError, match="attempt 4 of this run has started; attempt 2 is superseded"):
        claim(root, 2)
    assert attempts.numbers(root) == [1, 4]


def test_a_record_under_another_name(root: Storage, tmp_path: Path) -> None:
    claim(root, 1)
    save(root, CheckpointId(10, 1))
    claim(root, 2, CheckpointId(10, 1))
    save(root, CheckpointId(20, 2))
    (tmp_path / ATTEMPTS / "0002.json").write_bytes((tmp_path / ATTEMPTS / "0001.json").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"0002\.json holds the record of attempt 1: it was copied or renamed"
    ):
        attempts.read(root, 2)
    assert committed(root) == [CheckpointId(20, 2), CheckpointId(10, 1)]


def test_a_record_that_resumed_from_something_else(root: Storage) -> None:
    tree = {"attempt": 2, "resumed_from": "checkpoints/latest", "excluded_positions": []}
    root.write(f"{ATTEMPTS}/0002.json", sealed(tree))
    with pytest.raises(CheckpointError, match=r"0002\.json: expected the path of .*, got checkpoints/latest"):
        attempts.read(root, 2)


# Checkpoint ids


def test_ids_and_their_names_sort_alike() -> None:
    ids = [CheckpointId(step, attempt) for step in (0, 9, 10, 123) for attempt in (1, 2, 10)]
    assert sorted(ids, reverse=True) == ids[::-1]
    assert sorted(checkpoint_id.name for checkpoint_id in ids) == [str(one) for one in ids]


def test_an_id_has_a_name_and_a_path() -> None:
    checkpoint_id = CheckpointId(30, 2)
    assert checkpoint_id.name == str(checkpoint_id) == "0000000030-0002"
    assert checkpoint_id.path() == "checkpoints/0000000030-0002"
    assert checkpoint_id.path(EMA) == "ema/0000000030-0002"
    assert checkpoint_id.path("") == "0000000030-0002"
    assert CheckpointId.parse(CheckpointId(30, 12345).name) == CheckpointId(30, 12345)


@pytest.mark.parametrize(
    "name", ["", "best", "30-2", "0000000030-002", "00000000030-0002", "0000000030-0002x", "x0000000030-0002"]
)
def test_other_names_are_no_ids(name: str) -> None:
    assert CheckpointId.parse(name) is None


# Checkpoints under wrong names


def test_a_checkpoint_under_another_name_is_not_read(root: Storage, tmp_path: Path) -> None:
    claim(root, 1)
    save(root, CheckpointId(6, 1), CheckpointId(9, 1))
    (tmp_path / CheckpointId(6, 1).path()).rename(tmp_path / CheckpointId(12, 2).path())
    with pytest.raises(CheckpointError) as caught:
        read_manifest(root, CheckpointId(12, 2))
    assert str(caught.value) == (
        f"{root.url}/{CheckpointId(12, 2).path()} holds step 6 of attempt 1: it was copied or renamed; "
        "its own name is 0000000006-0001"
    )
    assert [one for one in committed(root) if attempts.is_readable(root, one)] == [CheckpointId(9, 1)]


def test_a_moved_folder_can_be_read(root: Storage, tmp_path: Path) -> None:
    claim(root, 1)
    save(root, CheckpointId(6, 1))
    (tmp_path / CHECKPOINTS).rename(tmp_path / "elsewhere")
    assert read_manifest(root, CheckpointId(6, 1), "elsewhere").step == 6
    assert read_manifest(open_storage(tmp_path / "elsewhere"), CheckpointId(6, 1), folder="").step == 6


# Any run


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_any_records_may_be_deleted(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Attempts, saves, saves of stale processes and deleted records, in any order.

    The newest checkpoint stays the newest, no number is used twice, the current attempt can save, and no
    attempt with a recorded successor can.
    """
    root = open_storage(tmp_path_factory.mktemp("run"))
    elsewhere = open_storage(tmp_path_factory.mktemp("elsewhere"))
    steps: dict[int, int] = {}  # attempt => its current step
    for _ in range(data.draw(st.integers(1, 5), "attempts")):
        resumed_from = next(iter(committed(root)), None)
        number = max(attempts.numbers(root), default=0) + 1
        assert number not in steps
        claim(root, number, resumed_from)
        at = steps[number] = resumed_from.step if resumed_from else 0
        for writer in [number, *data.draw(st.lists(st.sampled_from([number, *steps]), max_size=4), "saves")]:
            steps[writer] += data.draw(st.integers(1, 3), "steps")
            saved = CheckpointId(steps[writer], writer)
            if writer == number:
                save(root, saved)
                at = steps[writer]
                continue
            with pytest.raises(SupersededError):
                save(root, saved)
            save(elsewhere, saved)  # by a stale process that checked the chain long ago
            key = f"{saved.path()}/{MANIFEST}"
            root.write(key, elsewhere.read(key))
        records = [key for key, _ in root.list(f"{ATTEMPTS}/")]
        for key in data.draw(st.lists(st.sampled_from(records), unique=True), "deleted"):
            if len(root.list(f"{ATTEMPTS}/")) > 1:
                root.delete(key)
        assert committed(root)[0] == CheckpointId(at, number)


@given(st.data())
@settings(max_examples=50)
def test_the_list_is_the_past_of_the_newest_attempt(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Compare with a list that each attempt truncates, each save extends, and no stale process changes."""
    root = open_storage(tmp_path_factory.mktemp("run"))
    past: list[CheckpointId] = []
    steps: dict[int, int] = {}  # attempt => its current step
    for number in range(1, data.draw(st.integers(1, 5), "attempts") + 1):
        resumed_from = data.draw(st.sampled_from([None, *past]), "resumed from")
        past = past[: past.index(resumed_from) + 1] if resumed_from else []
        claim(root, number, resumed_from)
        steps[number] = resumed_from.step if resumed_from else 0
        for writer in data.draw(st.lists(st.sampled_from([number, *steps]), max_size=5), "saves of"):
            steps[writer] += data.draw(st.integers(1, 3), "steps")
            put(root, CheckpointId(steps[writer], writer))
            if writer == number:
                past.append(CheckpointId(steps[writer], writer))
        assert committed(root) == past[::-1]
