"""Checkpoints on disk: any layout reads what any other wrote, errors name damage, commits are idempotent."""

import hashlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from dit_scale.checkpoint import attempts, rankfile, writer
from dit_scale.checkpoint.attempts import AttemptRecord, committed
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, MANIFEST, CheckpointId, FileRecord, Manifest
from dit_scale.checkpoint.partition import EXP_AVG, EXP_AVG_SQ, MASTER, Partition
from dit_scale.checkpoint.reader import Checkpoint, fill
from dit_scale.checkpoint.retention import Rule
from dit_scale.checkpoint.saver import Snapshot
from dit_scale.checkpoint.slices import ParameterSlice, StoredSlice
from dit_scale.errors import CheckpointError, SupersededError
from dit_scale.storage import DiskStorage, Storage, open_storage
from tests.support import checkpoints

WEIGHT, BIAS, LAST = "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "final_layer.linear.weight"
SHAPES = {WEIGHT: (9, 7), BIAS: (9,), LAST: (2, 3, 5)}
KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ, "ema.paper")
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())
ID = CheckpointId(30, 2)
PATH = ID.path()


def numbers(kind: str, parameter: str) -> Tensor:
    """The flattened values of one kind of a parameter; no two elements of a checkpoint are equal."""
    start = 1000 * (10 * KINDS.index(kind) + list(SHAPES).index(parameter)) + 1
    return torch.arange(start, start + math.prod(SHAPES[parameter])).float()


def layout(cuts: list[int], padding: int = 0) -> list[tuple[Partition, ...]]:
    """ZeRO-1 and 2: all parameters concatenated and cut at these elements, one partition per rank."""
    edges = [0, *sorted(cuts), TOTAL]
    return [(_partition(_slices(low, high), high - low + padding),) for low, high in pairwise(edges)]


def layout_by_parameter(world: int) -> list[tuple[Partition, ...]]:
    """ZeRO-3: every parameter cut into `world` equal slices; the last ones are short or empty."""
    ranks: list[tuple[Partition, ...]] = []
    for rank in range(world):
        slices, offset = [], 0
        for name, shape in SHAPES.items():
            share = -(-math.prod(shape) // world)
            length = min(share, math.prod(shape) - rank * share)
            if length > 0:
                slices.append(ParameterSlice(name, rank * share, length, offset))
            offset += share
        ranks.append((_partition(slices, offset),))
    return ranks


def _slices(low: int, high: int) -> list[ParameterSlice]:
    slices, first = [], 0
    for name, shape in SHAPES.items():
        start, end = max(low, first), min(high, first + math.prod(shape))
        if start < end:
            slices.append(ParameterSlice(name, start - first, end - start, start - low))
        first += math.prod(shape)
    return slices


def _partition(slices: list[ParameterSlice], size: int) -> Partition:
    partition = blank(Partition({kind: torch.empty(size) for kind in KINDS}, tuple(slices)))
    fill([partition], KINDS, lambda kind, name, start, n: numbers(kind, name)[start : start + n])
    return partition


def blank(partition: Partition) -> Partition:
    return Partition({k: torch.full_like(v, -1.0) for k, v in partition.buffers.items()}, partition.slices)


def write(root: Storage, ranks: checkpoints.Ranks, **fields: Any) -> Manifest:
    rows = ((0.1, 0.2, 1e-3, 1 / 3, 0.0),)
    return checkpoints.write(root, ID, ranks, **{"model_shapes": SHAPES, "pending_metrics": rows, **fields})


def assert_whole(checkpoint: Checkpoint) -> None:
    for kind in KINDS:
        whole = checkpoint.read_whole(kind)
        assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == SHAPES
        for name, tensor in whole.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor.flatten(), numbers(kind, name))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankfile, "BLOCK_BYTES", 64)


LAYOUTS = {
    "one rank": layout([]),
    "three ranks": layout([40, 70]),
    "cut inside every parameter": layout([1, 64, 69, 101], padding=3),
    "a rank that owns nothing": layout([50, 50]),
    "by parameter, 4 ranks": layout_by_parameter(4),
    "by parameter, 7 ranks": layout_by_parameter(7),
}


@pytest.mark.parametrize("written", LAYOUTS)
@pytest.mark.usefixtures("small_blocks")
def test_any_layout_reads_what_any_other_wrote(root: Storage, written: str) -> None:
    manifest = write(root, LAYOUTS[written])
    checkpoint = Checkpoint(root, ID)
    assert checkpoint.manifest == manifest
    assert checkpoint.kinds() == set(KINDS)
    assert checkpoint.bytes == sum(size for key, size in root.list() if not key.endswith(MANIFEST))
    assert_whole(checkpoint)
    for ranks in LAYOUTS.values():
        for owned in ranks:
            fresh = [blank(partition) for partition in owned]
            fill(fresh, KINDS, checkpoint.read)
            for new, old in zip(fresh, owned, strict=True):
                for kind in KINDS:
                    assert torch.equal(new.buffers[kind], old.buffers[kind])


@given(
    st.lists(st.integers(0, TOTAL), max_size=6),
    st.sampled_from(list(SHAPES)),
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(0, 62), st.integers(1, 63)), min_size=1, max_size=8),
)
@settings(max_examples=25)
def test_any_range_of_a_parameter(
    cuts: list[int], parameter: str, block_elements: int, ranges: list[tuple[int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankfile, "BLOCK_BYTES", 4 * block_elements)
        root = open_storage(folder)
        write(root, layout(cuts))
        checkpoint = Checkpoint(root, ID)
        values = numbers(MASTER, parameter)
        for start, length in ranges:
            start = start % len(values)
            end = min(start + length, len(values))
            assert torch.equal(checkpoint.read(MASTER, parameter, start, end - start), values[start:end])


def test_blocks_of_the_default_size(root: Storage) -> None:
    """Three blocks, the last one short; ranges within blocks, across them and at their ends."""
    elements = rankfile.BLOCK_BYTES // 4
    size = 2 * elements + 5
    values = torch.arange(size).float()
    manifest = checkpoints.write(
        root, ID, [[Partition({MASTER: values}, (ParameterSlice("w", 0, size, 0),))]]
    )
    (stored,) = rankfile.open_file(root, PATH, manifest.files[0])
    assert len(stored.crc32c) == 3
    checkpoint = Checkpoint(root, ID)
    for start, end in pairwise((0, 1, elements - 1, elements, elements + 1, 2 * elements, 2 * elements + 5)):
        assert torch.equal(checkpoint.read(MASTER, "w", start, end - start), values[start:end])
    assert torch.equal(checkpoint.read(MASTER, "w", 0, size), values)
    checkpoint.verify()


def test_only_the_blocks_of_a_range_are_read(
    root: Storage, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    write(root, layout([]))
    checkpoint = Checkpoint(root, ID)
    ranges: list[int] = []
    read_range = DiskStorage.read_range

    def counting(self: DiskStorage, key: str, start: int, length: int) -> bytes:
        ranges.append(length)
        return read_range(self, key, start, length)

    monkeypatch.setattr(DiskStorage, "read_range", counting)
    checkpoint.read(MASTER, WEIGHT, 17, 3)
    assert ranges == [64]


def test_verify_reads_as_many_blocks_per_request_as_fit(
    root: Storage, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    monkeypatch.setattr(rankfile, "RUN_BYTES", 4 * 64)
    sizes = {
        "a": 9 * 16 + 5,
        "b": 3,
    }  # ten blocks of one tensor, the last one short, and one block of the other
    ranks = [
        [Partition({MASTER: torch.ones(n)}, (ParameterSlice(name, 0, n, 0),)) for name, n in sizes.items()]
    ]
    file = checkpoints.write(root, ID, ranks).files[0]
    ranges: list[tuple[int, int]] = []
    read_range = DiskStorage.read_range

    def counting(self: DiskStorage, key: str, start: int, length: int) -> bytes:
        ranges.append((start, length))
        return read_range(self, key, start, length)

    monkeypatch.setattr(DiskStorage, "read_range", counting)
    rankfile.verify(root, PATH, file)
    body = file.header_bytes
    assert ranges == [(0, body), (body, 256), (body + 256, 256), (body + 512, 64 + 4 * 5 + 4 * 3)]


def test_rank_files_are_plain_safetensors(root: Storage, tmp_path: Path) -> None:
    write(root, layout([40]))
    with safe_open(tmp_path / PATH / "rank-00001.safetensors", framework="pt") as file:
        assert set(json.loads(file.metadata()["crc32c"])) == set(file.keys())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(tensors) >= {f"master/{WEIGHT}@40", f"ema.paper/{LAST}@0"}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        parameter, _, start = rest.rpartition("@")
        assert torch.equal(tensor, numbers(kind, parameter)[int(start) : int(start) + len(tensor)])


def test_equal_states_are_written_as_equal_bytes(tmp_path: Path) -> None:
    written = []
    for place in ("a", "b"):
        root = open_storage(tmp_path / place)
        write(root, layout([40]))
        written.append([root.read(key) for key, _ in root.list()])
    assert written[0] == written[1]


# Damage


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankfile, "BLOCK_BYTES", 64)
        write(open_storage(folder), layout([40, 70]))
    return folder


@pytest.fixture
def mended(finished: Path, small_blocks: None) -> Iterator[Path]:
    """The root; all changes of a test to the checkpoint's files are undone."""
    files = {path: path.read_bytes() for path in (finished / PATH).iterdir()}
    yield finished
    for path, data in files.items():
        path.write_bytes(data)


def read_all(folder: Path) -> None:
    assert_whole(Checkpoint(open_storage(folder), ID))


def damage(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def rank_file(folder: Path, rank: int) -> tuple[Path, bytes, int]:
    """Return the path, the content and the first byte after the header."""
    path = folder / PATH / rankfile.file_name(rank)
    data = path.read_bytes()
    return path, data, 8 + int.from_bytes(data[:8], "little")


def slices_of(folder: Path, rank: int) -> tuple[StoredSlice, ...]:
    root = open_storage(folder)
    return rankfile.open_file(root, PATH, Checkpoint(root, ID).manifest.files[rank])


def tensor_at(folder: Path, rank: int, byte: int) -> str:
    """Return "KIND of PARAMETER" for the tensor that holds this byte of a rank's file."""
    for stored in slices_of(folder, rank):
        if stored.byte_offset <= byte < stored.byte_offset + stored.bytes:
            return f"{stored.kind} of {stored.parameter}"
    raise AssertionError(f"byte {byte} belongs to no tensor")


@pytest.mark.parametrize("rank", range(3))
def test_a_flipped_bit_of_the_data_is_named(mended: Path, rank: int) -> None:
    path, data, body = rank_file(mended, rank)
    draws = np.random.default_rng(rank)
    for at in draws.integers(body, len(data), 60):
        expected = tensor_at(mended, rank, int(at))
        path.write_bytes(damage(data, at, bytes([data[at] ^ (1 << draws.integers(8))])))
        for look in (read_all, lambda folder: Checkpoint(open_storage(folder), ID).verify()):
            with pytest.raises(CheckpointError) as caught:
                look(mended)
            assert f"{PATH}/rank-{rank:05d}.safetensors: {expected} is damaged" in str(caught.value)
        path.write_bytes(data)


def test_the_elements_of_a_damaged_block_are_named(mended: Path) -> None:
    path, data, _ = rank_file(mended, 1)
    checkpoint = Checkpoint(open_storage(mended), ID)
    stored = next(stored for stored in slices_of(mended, 1) if stored.start == 40)
    at = stored.byte_offset + 4 * 20  # element 60 of the parameter, in the second block of 16 elements
    path.write_bytes(damage(data, at, b"\xff"))
    assert checkpoint.read(stored.kind, stored.parameter, 40, 16).tolist() == [
        *numbers(stored.kind, stored.parameter)[40:56]
    ]
    with pytest.raises(CheckpointError, match=r"CRC-32C of elements 56 to 63\b"):
        checkpoint.read(stored.kind, stored.parameter, 58, 1)


def test_a_flipped_bit_of_a_header_is_named(mended: Path) -> None:
    path, data, body = rank_file(mended, 0)
    for at in range(0, body, 9):
        path.write_bytes(damage(data, at, bytes([data[at] ^ 1])))
        with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: its header is damaged"):
            Checkpoint(open_storage(mended), ID)


def test_a_flipped_bit_of_the_manifest_is_detected(mended: Path) -> None:
    path = mended / PATH / MANIFEST
    data = path.read_bytes()
    draws = np.random.default_rng(5)
    for at in (0, 1, len(data) - 1, len(data) - 10, len(data) - 70, *draws.integers(0, len(data), 120)):
        path.write_bytes(damage(data, at, bytes([data[at] ^ (1 << draws.integers(8))])))
        with pytest.raises(CheckpointError, match=f"{PATH}/{MANIFEST} is damaged"):
            Checkpoint(open_storage(mended), ID)


@pytest.mark.parametrize("rank", range(3))
def test_zeroed_pages_are_detected(mended: Path, rank: int) -> None:
    path, data, body = rank_file(mended, rank)
    for start in range(0, len(data), 64):
        path.write_bytes(damage(data, start, bytes(min(64, len(data) - start))))
        expected = "its header" if start < body else ".*"
        with pytest.raises(CheckpointError, match=f"rank-0000{rank}.safetensors: {expected} is damaged"):
            read_all(mended)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_truncated_file_is_named_before_anything_is_read(mended: Path, keep: int) -> None:
    path, data, _ = rank_file(mended, 1)
    path.write_bytes(data[:keep])
    expected = f"rank-00001.safetensors: expected {len(data)} bytes, got {len(data[:keep])}"
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint(open_storage(mended), ID)


@pytest.mark.parametrize("more", [1, 8, 4096])
def test_a_file_that_is_too_long_is_named_before_anything_is_read(mended: Path, more: int) -> None:
    path, data, _ = rank_file(mended, 1)
    path.write_bytes(data + bytes(more))
    expected = f"rank-00001.safetensors: expected {len(data)} bytes, got {len(data) + more}"
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint(open_storage(mended), ID)


@pytest.mark.parametrize("keep", [0, 1, 500, -1])
def test_a_truncated_manifest_is_named(mended: Path, keep: int) -> None:
    path = mended / PATH / MANIFEST
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=MANIFEST):
        Checkpoint(open_storage(mended), ID)


def test_a_file_that_shrinks_while_it_is_read(mended: Path) -> None:
    checkpoint = Checkpoint(open_storage(mended), ID)
    path, data, _ = rank_file(mended, 2)
    path.write_bytes(data[:-200])
    with pytest.raises(CheckpointError, match=r"of .*rank-00002.safetensors at .* expected \d+ bytes"):
        assert_whole(checkpoint)


class FlippingDisk(DiskStorage):
    """A disk whose first answers for every range have a flipped bit."""

    def __init__(self, folder: Path, wrong_answers: int) -> None:
        super().__init__(folder)
        self._answers = Counter[tuple[str, int]]()
        self._wrong_answers = wrong_answers

    def read_range(self, key: str, start: int, length: int) -> bytes:
        data = super().read_range(key, start, length)
        self._answers[key, start] += 1
        wrong = self._answers[key, start] <= self._wrong_answers
        return damage(data, length // 2, bytes([data[length // 2] ^ 1])) if wrong else data


def test_bits_flipped_in_transit_are_no_damage(finished: Path, small_blocks: None) -> None:
    """Three wrong answers in a row are retried; the fourth counts as damage."""
    assert_whole(Checkpoint(FlippingDisk(finished, wrong_answers=3), ID))
    with pytest.raises(CheckpointError, match="its header is damaged"):
        Checkpoint(FlippingDisk(finished, wrong_answers=4), ID)


def test_a_missing_file_is_named(root: Storage) -> None:
    write(root, layout([40]))
    root.delete(f"{PATH}/rank-00001.safetensors")
    with pytest.raises(CheckpointError, match=f"{PATH}/rank-00001.safetensors: not found"):
        Checkpoint(root, ID)


def test_a_missing_kind_or_parameter_is_named(root: Storage) -> None:
    write(root, layout([40]))
    checkpoint = Checkpoint(root, ID)
    with pytest.raises(CheckpointError, match=f"ema.other of {BIAS} has 0 of 9 elements"):
        checkpoint.read("ema.other", BIAS, 0, 9)
    with pytest.raises(CheckpointError, match=f"master of {BIAS} has 4 of 9 elements"):
        checkpoint.read(MASTER, BIAS, 5, 9)


@pytest.mark.parametrize(
    "slices",
    [[(0, 5)], [(0, 4), (5, 4)], [(0, 5), (4, 4)], [(0, 4), (0, 5)], [(0, 9), (9, 1)]],
    ids=["too short", "a hole", "an overlap", "twice the same", "too long"],
)
def test_missing_and_overlapping_slices_are_named(root: Storage, slices: list[tuple[int, int]]) -> None:
    ranks = [
        [Partition({MASTER: torch.ones(n)}, (ParameterSlice(BIAS, start, n, 0),))] for start, n in slices
    ]
    checkpoints.write(root, ID, ranks, model_shapes={BIAS: (9,)})
    with pytest.raises(CheckpointError, match=f"master of {BIAS} has missing or overlapping slices"):
        Checkpoint(root, ID).verify()


def test_losses_that_are_not_finite_round_trip(root: Storage) -> None:
    rows = ((math.nan, math.inf, -math.inf, 1.0),)
    write(root, [], pending_metrics=rows, guard={"mean": math.inf})
    manifest = Checkpoint(root, ID).manifest
    assert repr(manifest.pending_metrics) == repr(rows)
    assert manifest.guard == {"mean": math.inf}


@pytest.mark.parametrize("other", [{"version": 1}, {"version": 9}, {"format": "something"}])
def test_another_format_is_refused(root: Storage, other: dict[str, Any]) -> None:
    write(root, [], **other)
    with pytest.raises(CheckpointError, match="this program reads dit-scale checkpoint version 2"):
        Checkpoint(root, ID)


def test_a_configuration_of_another_version_is_refused(root: Storage) -> None:
    write(root, [], config={"new_knob": 1})
    with pytest.raises(
        CheckpointError, match=r"was written by another version of this program: .*\n.*new_knob"
    ):
        _ = Checkpoint(root, ID).config


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (ParameterSlice("w", 0, 4, 0), "offset"),
        (Partition({}, ()), "slices"),
        (StoredSlice(MASTER, "w", start=0, length=4, byte_offset=8, crc32c=()), "byte_offset"),
        (AttemptRecord(1), "resumed_from"),
        (FileRecord(key="k", bytes=8, header_bytes=8, header_sha256=""), "bytes"),
        (writer.Reply(), "problem"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_record_cannot_be_changed(record: Any, field: str) -> None:
    with pytest.raises((FrozenInstanceError, ValidationError)):
        setattr(record, field, getattr(record, field))


# Commit


def test_nothing_exists_before_its_manifest(root: Storage) -> None:
    assert committed(root) == []
    checkpoints.write_rank(root, ID, 0, layout([])[0])
    assert committed(root) == []
    with pytest.raises(CheckpointError, match=MANIFEST):
        Checkpoint(root, ID)


def test_a_checkpoint_is_committed_once(root: Storage) -> None:
    manifest = write(root, layout([]))
    before = root.read(f"{PATH}/{MANIFEST}")
    with pytest.raises(CheckpointError, match="has a manifest already: another process writes to this run"):
        writer.write_manifest(root, manifest.model_copy(update={"samples": 0}))
    writer.write_manifest(root, manifest)  # retry of a commit whose answer was lost
    assert root.read(f"{PATH}/{MANIFEST}") == before


def test_the_manifest_is_json_sealed_by_its_last_key(root: Storage) -> None:
    write(root, layout([]))
    data = root.read(f"{PATH}/{MANIFEST}")
    tree = json.loads(data)
    assert list(tree)[-1] == "sha256"
    assert tree["sha256"] == hashlib.sha256(data[: data.rindex(b',"sha256"')]).hexdigest()


# The writer: the memory that a rank shares with it


def written(
    root: Storage, owned: tuple[Partition, ...], rank: int, folders: dict[str, tuple[str, ...]]
) -> dict[str, FileRecord]:
    """Write a rank's snapshot as its writer process does."""
    snapshot = Snapshot(owned)
    snapshot.take()
    with open(snapshot.file, "rb") as file:
        memory = np.frombuffer(file.read(), np.uint8)
    request = writer.Write(checkpoint=ID, folders=folders)
    return writer.write(root, rank, memory, snapshot.slices, request).files


def commit(root: Storage, ranks: list[dict[str, FileRecord]], **fields: Any) -> writer.Reply:
    """Commit the files of these ranks."""
    with tempfile.TemporaryDirectory() as elsewhere:
        manifest = write(open_storage(elsewhere), [], **fields)
    files = {folder: tuple(rank[folder] for rank in ranks) for folder in ranks[0]}
    return writer.commit(root, writer.Commit(files=files, manifest=manifest, rule=Rule(1)))


@pytest.mark.parametrize("split", LAYOUTS)
def test_a_commit_of_several_writers(root: Storage, split: str) -> None:
    ranks = LAYOUTS[split]
    folders = {EMA: ("ema.paper",), CHECKPOINTS: KINDS}
    files = [written(root, owned, rank, folders) for rank, owned in enumerate(ranks)]
    assert commit(root, files) == writer.Reply()
    checkpoint, averages = Checkpoint(root, ID), Checkpoint(root, ID, EMA)
    assert_whole(checkpoint)
    checkpoint.verify()
    averages.verify()
    assert averages.kinds() == {"ema.paper"}
    for name, tensor in averages.read_whole("ema.paper").items():
        assert torch.equal(tensor.flatten(), numbers("ema.paper", name))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.9, 1.0], ids=lambda share: f"at {share:.0%}")
def test_a_disk_that_corrupts_writes_is_detected(
    root: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    real = DiskStorage.write_stream

    def write_wrongly(self: DiskStorage, key: str, *rest: Any) -> None:
        real(self, key, *rest)
        data = bytearray((tmp_path / key).read_bytes())
        data[int(share * (len(data) - 1))] ^= 4
        (tmp_path / key).write_bytes(data)

    monkeypatch.setattr(DiskStorage, "write_stream", write_wrongly)
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: .* is damaged"):
        written(root, layout([])[0], 0, {CHECKPOINTS: KINDS})


def test_a_superseded_attempt_commits_nothing(root: Storage) -> None:
    for number in (2, 3):
        attempts.claim(root, AttemptRecord(number))
    files = written(root, layout([])[0], 0, {CHECKPOINTS: KINDS})
    with pytest.raises(SupersededError, match="attempt 3 of this run has started; attempt 2 is superseded"):
        commit(root, [files])
    assert not root.exists(f"{PATH}/{MANIFEST}")
