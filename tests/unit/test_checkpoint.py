"""Checkpoints on disk: any split writes, any split reads, damage is named, retention deletes in order."""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dit_scale.config import TrainConfig
from dit_scale.errors import CheckpointError
from dit_scale.storage import DiskStorage, Storage, open_storage
from dit_scale.train import checkpoint as checkpoints
from dit_scale.train.checkpoint import MANIFEST, Checkpoint, Manifest, committed, fill, name_of, prune
from dit_scale.train.engine import EXP_AVG, EXP_AVG_SQ, MASTER, Extent, Partition

WEIGHT, BIAS, LAST = "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "final_layer.linear.weight"
SHAPES = {WEIGHT: (9, 7), BIAS: (9,), LAST: (2, 3, 5)}
KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ, "ema.paper")
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())
NAME = name_of(30, 2)


def numbers(kind: str, parameter: str) -> Tensor:
    """What a kind of a parameter holds, flattened; no two elements of a checkpoint are alike."""
    start = 1000 * (10 * KINDS.index(kind) + list(SHAPES).index(parameter)) + 1
    return torch.arange(start, start + math.prod(SHAPES[parameter])).float()


def layout(cuts: list[int], padding: int = 0) -> list[tuple[Partition, ...]]:
    """ZeRO 1 and 2: all parameters in one row, cut at these places; each piece is a rank's partition."""
    edges = [0, *sorted(cuts), TOTAL]
    return [(_partition(_extents(low, high), high - low + padding),) for low, high in pairwise(edges)]


def layout_by_parameter(world: int) -> list[tuple[Partition, ...]]:
    """ZeRO 3: every parameter cut in `world` equal parts, the last ones short or empty."""
    ranks = []
    for rank in range(world):
        extents, offset = [], 0
        for name, shape in SHAPES.items():
            share = -(-math.prod(shape) // world)
            length = min(share, math.prod(shape) - rank * share)
            if length > 0:
                extents.append(Extent(name, rank * share, length, offset))
            offset += share
        ranks.append((_partition(extents, offset),))
    return ranks


def _extents(low: int, high: int) -> list[Extent]:
    extents, first = [], 0
    for name, shape in SHAPES.items():
        start, end = max(low, first), min(high, first + math.prod(shape))
        if start < end:
            extents.append(Extent(name, start - first, end - start, start - low))
        first += math.prod(shape)
    return extents


def _partition(extents: list[Extent], size: int) -> Partition:
    partition = blank(Partition({kind: torch.empty(size) for kind in KINDS}, tuple(extents)))
    fill([partition], KINDS, lambda kind, name, start, n: numbers(kind, name)[start : start + n])
    return partition


def blank(partition: Partition) -> Partition:
    return Partition({k: torch.full_like(v, -1.0) for k, v in partition.buffers.items()}, partition.extents)


def write(storage: Storage, ranks: list[tuple[Partition, ...]], step: int = 30, attempt: int = 2) -> Manifest:
    name = name_of(step, attempt)
    files = [checkpoints.write_rank_file(storage, name, rank, owned) for rank, owned in enumerate(ranks)]
    manifest = Manifest(
        step=step,
        samples=step * 256,
        attempt=attempt,
        config=TrainConfig().model_dump(mode="json"),
        data_sha256="1" * 64,
        vae_sha256="2" * 64,
        model_shapes=SHAPES,
        optimizer_groups=({"lr": 1e-4, "betas": [0.9, 0.999]},),
        pending_metrics=((0.1, 0.2, 1e-3, 1 / 3),),
        versions={"torch": "x"},
        written_by={"world": len(ranks), "zero_stage": 2},
        files=tuple(files),
    )
    checkpoints.commit(storage, manifest)
    return manifest


def assert_whole(checkpoint: Checkpoint) -> None:
    for kind in KINDS:
        whole = checkpoint.read_whole(kind)
        assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == SHAPES
        for name, tensor in whole.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor.flatten(), numbers(kind, name))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", 64)


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
def test_any_split_reads_what_any_split_wrote(storage: Storage, written: str) -> None:
    manifest = write(storage, LAYOUTS[written])
    checkpoint = Checkpoint(storage, NAME)
    assert checkpoint.manifest == manifest
    assert checkpoint.kinds() == set(KINDS)
    assert checkpoint.bytes == sum(size for key, size in storage.list() if not key.endswith(MANIFEST))
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
        patch.setattr(checkpoints, "BLOCK_BYTES", 4 * block_elements)
        storage = open_storage(folder)
        write(storage, layout(cuts))
        checkpoint = Checkpoint(storage, NAME)
        values = numbers(MASTER, parameter)
        for start, length in ranges:
            start = start % len(values)
            end = min(start + length, len(values))
            assert torch.equal(checkpoint.read(MASTER, parameter, start, end - start), values[start:end])


def test_blocks_of_the_real_size(storage: Storage) -> None:
    """Three blocks, the last one short; ranges within, across and at the ends of blocks."""
    elements = checkpoints.BLOCK_BYTES // 4
    size = 2 * elements + 5
    values = torch.arange(size).float()
    file = checkpoints.write_rank_file(
        storage, NAME, 0, [Partition({MASTER: values}, (Extent("w", 0, size, 0),))]
    )
    assert len(file.tensors[0].crc32c) == 3
    manifest = write(storage, [], step=1)
    checkpoints.commit(storage, manifest.model_copy(update={"step": 30, "files": (file,)}))
    checkpoint = Checkpoint(storage, NAME)
    for start, end in pairwise((0, 1, elements - 1, elements, elements + 1, 2 * elements, 2 * elements + 5)):
        assert torch.equal(checkpoint.read(MASTER, "w", start, end - start), values[start:end])
    assert torch.equal(checkpoint.read(MASTER, "w", 0, size), values)


def test_only_the_blocks_of_a_range_are_read(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    write(storage, layout([]))
    checkpoint = Checkpoint(storage, NAME)
    ranges: list[int] = []
    read_range = DiskStorage.read_range

    def counting(self: DiskStorage, key: str, start: int, length: int) -> bytes:
        ranges.append(length)
        return read_range(self, key, start, length)

    monkeypatch.setattr(DiskStorage, "read_range", counting)
    checkpoint.read(MASTER, WEIGHT, 17, 3)
    assert ranges == [64]


def test_rank_files_are_plain_safetensors(storage: Storage, tmp_path: Path) -> None:
    write(storage, layout([40]))
    tensors = load_file(tmp_path / NAME / "rank-00001.safetensors")
    assert set(tensors) >= {f"master/{WEIGHT}@40", f"ema.paper/{LAST}@0"}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        parameter, _, start = rest.rpartition("@")
        assert torch.equal(tensor, numbers(kind, parameter)[int(start) : int(start) + len(tensor)])


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for place in ("a", "b"):
        storage = open_storage(tmp_path / place)
        write(storage, layout([40]))
        written.append([storage.read(key) for key, _ in storage.list()])
    assert written[0] == written[1]


# Damage


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "BLOCK_BYTES", 64)
        write(open_storage(folder), layout([40, 70]))
    return folder


@pytest.fixture
def mended(finished: Path, small_blocks: None) -> Iterator[Path]:
    """The checkpoint's folder; whatever a test does to its files is undone."""
    files = {path: path.read_bytes() for path in (finished / NAME).iterdir()}
    yield finished
    for path, data in files.items():
        path.write_bytes(data)


def read_all(folder: Path) -> None:
    assert_whole(Checkpoint(open_storage(folder), NAME))


def damage(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def rank_file(folder: Path, rank: int) -> tuple[Path, bytes, int]:
    """Path, content and the first byte behind the header."""
    path = folder / NAME / f"rank-{rank:05d}.safetensors"
    data = path.read_bytes()
    return path, data, 8 + int.from_bytes(data[:8], "little")


def tensor_at(folder: Path, rank: int, byte: int) -> str:
    """ "kind of parameter" of the tensor that holds this byte of a rank's file."""
    for tensor in Checkpoint(open_storage(folder), NAME).manifest.files[rank].tensors:
        if tensor.offset <= byte < tensor.offset + 4 * tensor.length:
            return f"{tensor.kind} of {tensor.parameter}"
    raise AssertionError(f"byte {byte} belongs to no tensor")


@pytest.mark.parametrize("rank", range(3))
def test_a_flipped_bit_of_the_data_is_named(mended: Path, rank: int) -> None:
    path, data, body = rank_file(mended, rank)
    draws = np.random.default_rng(rank)
    for at in draws.integers(body, len(data), 60):
        expected = tensor_at(mended, rank, int(at))
        path.write_bytes(damage(data, at, bytes([data[at] ^ (1 << draws.integers(8))])))
        with pytest.raises(CheckpointError) as caught:
            read_all(mended)
        assert f"{NAME}/rank-{rank:05d}.safetensors: {expected} is damaged" in str(caught.value)


def test_the_elements_of_a_damaged_block_are_named(mended: Path) -> None:
    path, data, _ = rank_file(mended, 1)
    checkpoint = Checkpoint(open_storage(mended), NAME)
    tensor = next(t for t in checkpoint.manifest.files[1].tensors if t.start == 40)
    at = tensor.offset + 4 * 20  # element 60 of the parameter, in the second block of 16 elements
    path.write_bytes(damage(data, at, b"\xff"))
    assert checkpoint.read(tensor.kind, tensor.parameter, 40, 16).tolist() == [
        *numbers(tensor.kind, tensor.parameter)[40:56]
    ]
    with pytest.raises(CheckpointError, match=r"CRC-32C of elements 56 to 63\b"):
        checkpoint.read(tensor.kind, tensor.parameter, 58, 1)


def test_a_flipped_bit_of_a_header_does_not_matter(mended: Path) -> None:
    path, data, body = rank_file(mended, 0)
    for at in range(0, body, 9):
        path.write_bytes(damage(data, at, bytes([data[at] ^ 1])))
        read_all(mended)


def test_a_flipped_bit_of_the_manifest_is_found(mended: Path) -> None:
    path = mended / NAME / MANIFEST
    data = path.read_bytes()
    draws = np.random.default_rng(5)
    for at in (0, 1, len(data) - 1, len(data) - 10, len(data) - 70, *draws.integers(0, len(data), 120)):
        path.write_bytes(damage(data, at, bytes([data[at] ^ (1 << draws.integers(8))])))
        with pytest.raises(CheckpointError, match=f"{NAME}/{MANIFEST} is damaged"):
            Checkpoint(open_storage(mended), NAME)


@pytest.mark.parametrize("rank", range(3))
def test_zeroed_pages_are_found(mended: Path, rank: int) -> None:
    path, data, body = rank_file(mended, rank)
    for start in range(body, len(data), 64):
        path.write_bytes(damage(data, start, bytes(min(64, len(data) - start))))
        with pytest.raises(CheckpointError, match=f"rank-0000{rank}.safetensors: .* is damaged"):
            read_all(mended)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_truncated_file_is_named_before_anything_is_read(mended: Path, keep: int) -> None:
    path, data, _ = rank_file(mended, 1)
    path.write_bytes(data[:keep])
    expected = f"rank-00001.safetensors: expected {len(data)} bytes, got {len(data[:keep])}"
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint(open_storage(mended), NAME)


@pytest.mark.parametrize("keep", [0, 1, 500, -1])
def test_a_truncated_manifest_is_named(mended: Path, keep: int) -> None:
    path = mended / NAME / MANIFEST
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=MANIFEST):
        Checkpoint(open_storage(mended), NAME)


def test_a_file_that_shrinks_while_it_is_read(mended: Path) -> None:
    checkpoint = Checkpoint(open_storage(mended), NAME)
    path, data, _ = rank_file(mended, 2)
    path.write_bytes(data[:-200])
    with pytest.raises(CheckpointError, match=r"rank-00002.safetensors at .* expected \d+ bytes"):
        assert_whole(checkpoint)


def test_a_missing_file_is_named(storage: Storage) -> None:
    write(storage, layout([40]))
    storage.delete(f"{NAME}/rank-00001.safetensors")
    with pytest.raises(CheckpointError, match=f"{NAME}/rank-00001.safetensors is missing"):
        Checkpoint(storage, NAME)


def test_what_it_does_not_hold_is_named(storage: Storage) -> None:
    write(storage, layout([40]))
    checkpoint = Checkpoint(storage, NAME)
    with pytest.raises(CheckpointError, match=f"ema.other of {BIAS} has 0 of 9 elements"):
        checkpoint.read("ema.other", BIAS, 0, 9)
    with pytest.raises(CheckpointError, match=f"master of {BIAS} has 4 of 9 elements"):
        checkpoint.read(MASTER, BIAS, 5, 9)


def test_a_loss_that_is_not_finite_is_kept_too(storage: Storage) -> None:
    manifest = write(storage, layout([]), step=1)
    rows = ((math.nan, math.inf, -math.inf, 1.0),)
    checkpoints.commit(storage, manifest.model_copy(update={"step": 2, "pending_metrics": rows}))
    read = Checkpoint(storage, name_of(2, 2)).manifest.pending_metrics
    assert repr(read) == repr(rows)


def test_another_version_is_refused(storage: Storage) -> None:
    manifest = write(storage, layout([]), step=1)
    checkpoints.commit(storage, manifest.model_copy(update={"step": 2, "version": 9}))
    with pytest.raises(CheckpointError, match="version 9, this program reads 1"):
        Checkpoint(storage, name_of(2, 2))


# Commit and retention


def test_nothing_exists_before_its_manifest(storage: Storage) -> None:
    assert committed(storage) == []
    checkpoints.write_rank_file(storage, NAME, 0, layout([])[0])
    assert committed(storage) == []
    with pytest.raises(CheckpointError, match=MANIFEST):
        Checkpoint(storage, NAME)


def test_only_folders_of_the_format_are_listed_newest_first(storage: Storage) -> None:
    for step, attempt in ((9, 1), (10, 1), (10, 2), (100, 1)):
        write(storage, layout([]), step, attempt)
    for foreign in (f"best/{MANIFEST}", f"old/{NAME}/{MANIFEST}", MANIFEST):
        storage.write(foreign, b"{}")
    assert committed(storage) == [name_of(100, 1), name_of(10, 2), name_of(10, 1), name_of(9, 1)]


def test_a_checkpoint_is_committed_once(storage: Storage) -> None:
    manifest = write(storage, layout([]))
    before = storage.read(f"{NAME}/{MANIFEST}")
    with pytest.raises(CheckpointError, match="is there already: another process writes to this run"):
        checkpoints.commit(storage, manifest.model_copy(update={"samples": 0}))
    assert storage.read(f"{NAME}/{MANIFEST}") == before


def test_the_manifest_is_json_sealed_by_its_last_key(storage: Storage) -> None:
    write(storage, layout([]))
    data = storage.read(f"{NAME}/{MANIFEST}")
    tree = json.loads(data)
    assert list(tree)[-1] == "sha256"
    assert tree["sha256"] == hashlib.sha256(data[: data.rindex(b',"sha256"')]).hexdigest()


@pytest.mark.parametrize(
    ("keep", "keep_every_steps", "left"),
    [
        (1, 0, [60]),
        (2, 0, [60, 50]),
        (9, 0, [60, 50, 40, 30, 20, 10]),
        (1, 20, [60, 40, 20]),
        (2, 30, [60, 50, 30]),
    ],
)
def test_retention(storage: Storage, keep: int, keep_every_steps: int, left: list[int]) -> None:
    for step in range(10, 70, 10):
        write(storage, layout([50]), step, 1)
    dropped = prune(storage, name_of(60, 1), keep, keep_every_steps)
    assert committed(storage) == [name_of(step, 1) for step in left]
    assert sorted(dropped) == [name_of(step, 1) for step in range(10, 70, 10) if step not in left]
    assert {key.split("/")[0] for key, _ in storage.list()} == {name_of(step, 1) for step in left}
    for name in committed(storage):
        assert_whole(Checkpoint(storage, name))


def test_the_manifest_goes_first(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        write(storage, layout([50]), step, 1)
    deleted: list[str] = []
    delete = DiskStorage.delete

    def recording(self: DiskStorage, key: str) -> None:
        deleted.append(key.split("/")[1])
        delete(self, key)

    monkeypatch.setattr(DiskStorage, "delete", recording)
    prune(storage, name_of(20, 1), keep=1, keep_every_steps=0)
    assert deleted == [MANIFEST, "rank-00000.safetensors", "rank-00001.safetensors"]


def test_nothing_goes_when_the_newest_does_not_open(storage: Storage) -> None:
    for step in (10, 20):
        write(storage, layout([50]), step, 1)
    storage.delete(f"{name_of(20, 1)}/rank-00000.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        prune(storage, name_of(20, 1), keep=1, keep_every_steps=0)
    assert_whole(Checkpoint(storage, name_of(10, 1)))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_that_the_run_passed_over_does_not_count(storage: Storage, keep: int) -> None:
    """Attempt 2 went on from step 20 because step 40 of attempt 1 had lost a file."""
    for step, attempt in ((10, 1), (20, 1), (40, 1), (30, 2)):
        write(storage, layout([50]), step, attempt)
    storage.delete(f"{name_of(40, 1)}/rank-00000.safetensors")
    prune(storage, name_of(30, 2), keep, keep_every_steps=0)
    assert committed(storage) == [name_of(40, 1), name_of(30, 2), name_of(20, 1)][: keep + 1]
    write(storage, layout([50]), 40, 2)
    write(storage, layout([50]), 50, 2)
    prune(storage, name_of(50, 2), keep, keep_every_steps=0)
    assert committed(storage) == [name_of(50, 2), name_of(40, 2)][:keep]


def test_what_killed_saves_left_behind_goes(storage: Storage) -> None:
    checkpoints.write_rank_file(storage, name_of(5, 1), 0, layout([])[0])
    write(storage, layout([]), 10, 2)
    checkpoints.write_rank_file(storage, name_of(20, 2), 0, layout([])[0])
    storage.write("notes/readme", b"a user's")
    assert prune(storage, name_of(10, 2), keep=2, keep_every_steps=0) == []
    assert [key for key, _ in storage.list()] == [
        f"{name_of(10, 2)}/{MANIFEST}",
        f"{name_of(10, 2)}/rank-00000.safetensors",
        f"{name_of(20, 2)}/rank-00000.safetensors",
        "notes/readme",
    ]
