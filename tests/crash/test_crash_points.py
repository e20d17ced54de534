"""Power cuts at any byte of a save: the newest committed checkpoint survives, or the one before.

Two ranks write with the shipped code, and every call to the file system is recorded. Then every state that a
POSIX file system may be in after a cut at any call, or inside any write, is created as a folder and read with
the shipped reader.
"""

import hashlib
import itertools
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dit_scale.checkpoint import attempts, rankfile, writer
from dit_scale.checkpoint.attempts import AttemptRecord, committed
from dit_scale.checkpoint.manifest import ATTEMPTS, CHECKPOINTS, EMA, CheckpointId, Manifest
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.retention import Rule
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.errors import CheckpointError
from dit_scale.storage import Storage, open_storage
from tests.support.faults.power_loss import Disk, Tree
from tests.support.faults.recorder import Call, Killed, Recorder

SHAPES = {"weight": (6, 8), "bias": (9,)}
KINDS = ("master", "exp_avg", "ema.wide")
RANKS = {"weight": (0, 30, 48), "bias": (0, 5, 9)}
"""The elements at which the slices of the two ranks start and end."""
BLOCK_BYTES = 128

STATES = 10_000
"""Smallest number of distinct states."""
CUTS_PER_WRITE = 8
SAMPLES = 20


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankfile, "BLOCK_BYTES", BLOCK_BYTES)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory if possible: no file of this test has to survive a power cut."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


# What a run does


def values(step: int, kind: str, parameter: str) -> np.ndarray:
    start = 1000 * (step + KINDS.index(kind)) + 100 * len(parameter)
    return np.arange(start, start + np.prod(SHAPES[parameter]), dtype="<f4")


def snapshot(step: int, rank: int) -> tuple[np.ndarray, list[tuple[str, ParameterSlice]]]:
    """The memory that a rank shares with its writer, and its layout."""
    parts, slices, offset = [], list[tuple[str, ParameterSlice]](), 0
    for kind in KINDS:
        for parameter, edges in RANKS.items():
            start, end = edges[rank], edges[rank + 1]
            parts.append(values(step, kind, parameter)[start:end])
            slices.append((kind, ParameterSlice(parameter, start, end - start, offset)))
            offset += end - start
    return np.concatenate(parts).view(np.uint8), slices


def save(root: Storage, step: int, attempt: int, keep: int, averages: bool = False) -> None:
    """Make an entire save, as the writers of two ranks do."""
    folders: dict[str, tuple[str, ...]] = {EMA: ("ema.wide",)} if averages else {}
    folders[CHECKPOINTS] = KINDS
    request = writer.Write(checkpoint=CheckpointId(step, attempt), folders=folders)
    ranks = [writer.write(root, rank, *snapshot(step, rank), request).files for rank in (0, 1)]
    manifest = Manifest(
        step=step,
        samples=step * 8,
        attempt=attempt,
        config={},
        data_sha256="",
        vae_sha256="",
        model_shapes=SHAPES,
        optimizer_groups=(),
    )
    files = {folder: tuple(rank[folder] for rank in ranks) for folder in folders}
    commit = writer.Commit(files=files, manifest=manifest, rule=Rule(keep))
    assert writer.commit(root, commit).retention_problem == ""


@dataclass
class History:
    """The calls of a run to the file system, and what they completed."""

    calls: list[Call] = field(default_factory=list)
    done: list[tuple[int, str, int]] = field(default_factory=list)
    """(number of calls up to its end, "attempt" or "save", its number or step)."""

    def promised(self, calls: int) -> tuple[int, list[int]]:
        """Return the last attempt claimed and the steps saved after this number of calls."""
        past = [(what, number) for end, what, number in self.done if end <= calls]
        saves = [number for what, number in past if what == "save"]
        return max((number for what, number in past if what == "attempt"), default=0), saves

    def without(self, forgotten: Callable[[Call], bool]) -> "History":
        """Return the history without some of the calls."""
        kept = [0 if forgotten(call) else 1 for call in self.calls]
        calls = [call for call in self.calls if not forgotten(call)]
        return History(calls, [(sum(kept[:end]), what, number) for end, what, number in self.done])


def record(folder: Path) -> History:
    """Record two attempts and four saves, including retention, from an empty folder."""
    folder.mkdir()
    recorder, history = Recorder(folder), History()
    root = open_storage(folder)

    def did(what: str, number: int) -> None:
        history.done.append((len(recorder.calls), what, number))

    with recorder.recording():
        attempts.claim(root, AttemptRecord(1))
        did("attempt", 1)
        save(root, 10, attempt=1, keep=2, averages=True)
        did("save", 10)
        save(root, 20, attempt=1, keep=2)
        did("save", 20)
        attempts.claim(root, AttemptRecord(2, CheckpointId(20, 1)))
        did("attempt", 2)
        save(root, 30, attempt=2, keep=2)
        did("save", 30)
        save(root, 40, attempt=2, keep=1, averages=True)
        did("save", 40)
    history.calls = recorder.calls
    return history


# What the reader sees


@dataclass(frozen=True)
class Found:
    """What the shipped reader sees in a folder."""

    step: int | None
    """Step of the newest readable checkpoint, as a run chooses it."""
    damaged: tuple[str, ...]
    """Problems of all listed checkpoints and averages."""
    averages: tuple[int, ...]
    """Steps with stored averages."""
    attempt: int


def problem_of(root: Storage, checkpoint_id: CheckpointId, folder: str) -> str:
    """Return why a checkpoint cannot be read; empty if every value is as it was saved."""
    try:
        checkpoint = Checkpoint(root, checkpoint_id, folder)
        checkpoint.verify()
        for kind in checkpoint.kinds():
            for parameter, tensor in checkpoint.read_whole(kind).items():
                expected = values(checkpoint.manifest.step, kind, parameter)
                assert np.array_equal(tensor.flatten().numpy(), expected)
    except CheckpointError as error:
        return str(error)
    return ""


def broken_promise(found: Found, attempt: int, saves: list[int]) -> str:
    """Return what is wrong given that these saves have ended; empty if nothing is."""
    if outcome(found, saves) == "lost":
        return f"step {found.step} was found, the saves of {saves} had ended"
    if found.damaged:
        return f"listed and not whole: {found.damaged}"
    if missing := {10, 40} & {*saves} - {*found.averages}:
        return f"the averages of {missing} are lost"
    if found.attempt < attempt:
        return f"attempt {attempt} is lost"
    return ""


def outcome(found: Found, saves: list[int]) -> str:
    last = saves[-1] if saves else 0
    if found.step == last + 10:
        return "the save under way"
    return ("the last that had ended" if last else "nothing") if found.step == (last or None) else "lost"


class Shelf:
    """A folder that is rewritten to one tree after another, and what the reader saw in each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shown: Tree = {}
        self._problems: dict[bytes, str] = {}
        """Hash of a checkpoint's folder => its problem: most states share most checkpoints."""
        self.found: dict[bytes, Found] = {}
        """Hash of the tree => what the reader saw."""
        folder.mkdir()

    def look(self, tree: Tree) -> Found:
        digest = _digest(tree)
        if digest not in self.found:
            self._show(tree)
            self.found[digest] = self._look(tree)
        return self.found[digest]

    def _look(self, tree: Tree) -> Found:
        root = open_storage(self._folder)
        damaged: list[str] = []
        steps: dict[str, list[int]] = {CHECKPOINTS: [], EMA: []}
        for folder, whole in steps.items():
            for checkpoint_id in committed(root, folder):
                path = checkpoint_id.path(folder)
                digest = _digest({name: content for name, content in tree.items() if name.startswith(path)})
                if digest not in self._problems:
                    self._problems[digest] = problem_of(root, checkpoint_id, folder)
                if problem := self._problems[digest]:
                    damaged.append(problem)
                else:
                    whole.append(checkpoint_id.step)
        latest = attempts.newest(root)
        step = next(iter(steps[CHECKPOINTS]), None)
        return Found(step, tuple(damaged), tuple(steps[EMA]), latest.number if latest else 0)

    def _show(self, tree: Tree) -> None:
        for path in sorted(self._shown.keys() - tree.keys(), reverse=True):
            gone = self._folder / path
            gone.rmdir() if self._shown[path] is None else gone.unlink()
        for path, content in sorted(tree.items()):
            if content is None:
                (self._folder / path).mkdir(exist_ok=True)
            elif self._shown.get(path) != content:
                (self._folder / path).write_bytes(content)
        self._shown = tree


def _digest(tree: Tree) -> bytes:
    return hashlib.sha256(repr(sorted(tree.items())).encode()).digest()


def cuts(calls: list[Call]) -> Iterator[tuple[int, Disk]]:
    """Yield (number of complete calls, disk): after every call, and inside every write."""
    disk = Disk()
    for number, call in enumerate(calls, 1):
        if call.kind == "write":
            edges = np.unique(np.linspace(0, len(call.data), CUTS_PER_WRITE + 2).astype(int)).tolist()
            for start, end in pairwise(edges):
                disk.apply(replace(call, data=call.data[start:end]))
                yield number - (end < len(call.data)), disk
        else:
            disk.apply(call)
            yield number, disk


def read_all(history: History, shelf: Shelf, samples: int, from_call: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (which save was found, broken promise or "") for every state after cuts from this call on."""
    draws = random.Random(0)
    for number, disk in cuts(history.calls):
        if number >= from_call:
            attempt, saves = history.promised(number)
            for tree in disk.after_power_loss(draws, samples):
                found = shelf.look(tree)
                problem = broken_promise(found, attempt, saves)
                yield outcome(found, saves), problem and f"after {number} calls: {problem}"


# Tests


def test_every_state_after_a_power_cut_is_readable(place: Path) -> None:
    history, shelf = record(place / "run"), Shelf(place / "shelf")
    outcomes = Counter[str]()
    for name, problem in read_all(history, shelf, SAMPLES):
        assert not problem
        outcomes[name] += 1
    print(f"\n{len(history.calls)} calls, {outcomes.total()} states, {len(shelf.found)} of them differ")
    print(f"the reader found {dict(outcomes)}")
    assert len(shelf.found) >= STATES
    assert {found.step for found in shelf.found.values()} == {None, 10, 20, 30, 40}


def test_replaying_the_calls_gives_the_folder(place: Path) -> None:
    history, run, disk = record(place / "run"), place / "run", Disk()
    for call in history.calls:
        disk.apply(call)
    seen = {path: path.read_bytes() if path.is_file() else None for path in run.rglob("*")}
    assert disk.tree() == {str(path.relative_to(run)): content for path, content in seen.items()}


@pytest.mark.parametrize(
    ("kind", "below"),
    [
        ("sync", f"{CHECKPOINTS}/.*/.MANIFEST"),
        ("sync", f"{CHECKPOINTS}/.*/.rank-00001"),
        ("sync", f"{EMA}/.*/.rank-00000"),
        ("sync", ATTEMPTS),
        ("sync folder", f"{CHECKPOINTS}/"),
        ("sync folder", f"{CHECKPOINTS}$"),
        ("sync folder", EMA),
        ("sync folder", ATTEMPTS),
        ("sync folder", "$"),
    ],
)
def test_a_missing_sync_is_detected(place: Path, kind: str, below: str) -> None:
    """The first test would fail for code without this sync."""
    history = record(place / "run").without(
        lambda call: call.kind == kind and bool(re.match(below, call.path))
    )
    assert any(problem for _, problem in read_all(history, Shelf(place / "shelf"), samples=2))


def test_a_killed_save_and_its_retry(place: Path) -> None:
    """Killed at every call; the retry finds folders that were never synced."""

    def first(root: Storage) -> None:
        attempts.claim(root, AttemptRecord(1))
        save(root, 10, attempt=1, keep=1, averages=True)

    def same_attempt(root: Storage) -> None:
        save(root, 10, attempt=1, keep=1, averages=True)

    def next_attempt(root: Storage) -> None:
        number = len(attempts.numbers(root)) + 1
        attempts.claim(root, AttemptRecord(number, next(iter(committed(root)), None)))
        save(root, 20, attempt=number, keep=1)
        assert not root.leftovers(f"{CHECKPOINTS}/")

    shelf = Shelf(place / "shelf")
    for again, step in ((same_attempt, 10), (next_attempt, 20)):
        for kill_at in itertools.count():
            calls = killed(place / again.__name__ / str(kill_at), kill_at, first, again)
            if not calls:
                break
            history = History(calls, [(len(calls), "save", step)])
            for _, problem in read_all(history, shelf, SAMPLES, from_call=len(calls)):
                assert not problem, f"killed at call {kill_at}"
        print(f"\n{again.__name__}: {kill_at} kills, {len(shelf.found)} states that differ so far")


def killed(
    run: Path, kill_at: int, first: Callable[[Storage], None], again: Callable[[Storage], None]
) -> list[Call]:
    """Record `first`, killed before this call, then `again`; no calls if `first` completes."""
    run.mkdir(parents=True)
    recorder, root = Recorder(run, kill_at), open_storage(run)
    with recorder.recording():
        try:
            first(root)
        except Killed:
            recorder.kill_at = None
            again(root)
            return recorder.calls
    return []
