"""A thousand injuries of stored objects: each is detected and named, and intact data can still be read.

An injury is a flipped bit, a truncated file, or a 4 KiB page of zeros.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_scale.checkpoint import attempts, rankfile
from dit_scale.checkpoint.attempts import AttemptRecord, committed
from dit_scale.checkpoint.manifest import ATTEMPTS, MANIFEST, CheckpointId
from dit_scale.checkpoint.partition import OPTIMIZER_KINDS, Partition
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.slices import ParameterSlice, StoredSlice
from dit_scale.config import TrainConfig
from dit_scale.data import files, shards
from dit_scale.data.shards import LatentDataset
from dit_scale.data.verify import verify
from dit_scale.dist import World
from dit_scale.errors import CheckpointError, DataError
from dit_scale.storage import Storage, open_storage
from dit_scale.train.restore import find_checkpoint
from tests.support import checkpoints
from tests.support.latents import write_latents

INJURIES = 500
"""Number of injuries of checkpoints, and of data."""
PAGE_BYTES = 4096
BLOCK_BYTES = 2048
SAMPLES, SHARD_SAMPLES = 20, 8

SHAPES = {"blocks.0.weight": (50, 60), "blocks.0.bias": (60,), "final.weight": (40, 30)}
NEWEST, OLDER = CheckpointId(40, 2), CheckpointId(30, 1)
DATA_SHA256 = "1" * 64


@dataclass(frozen=True)
class Injury:
    kind: str
    data: bytes
    """The content after the injury."""
    changed: np.ndarray
    """Offsets of the changed bytes, including lost ones."""


def injure(data: bytes, draws: np.random.Generator) -> Injury:
    """Return a random injury that changes at least one byte."""
    array = np.frombuffer(data, np.uint8)
    while True:
        kind = str(draws.choice(["bit", "end", "page"]))
        if kind == "end":
            length = int(draws.integers(len(data)))
            return Injury(kind, data[:length], np.arange(length, len(data)))
        after = array.copy()
        if kind == "bit":
            # more often near the start, where the headers are
            after[draws.integers(-(-len(data) // 2 ** draws.integers(5)))] ^= 1 << draws.integers(8)
        else:
            start = PAGE_BYTES * int(draws.integers(-(-len(data) // PAGE_BYTES)))
            after[start : start + PAGE_BYTES] = 0
        if (after != array).any():
            return Injury(kind, after.tobytes(), np.flatnonzero(after != array))


def injured(folder: Path, keys: list[str], num: int) -> Iterator[tuple[str, Injury]]:
    """Injure `num` random objects, yielding (key, injury); each is repaired before the next."""
    draws = np.random.default_rng(0)
    for _ in range(num):
        key = str(draws.choice(keys))
        data = (folder / key).read_bytes()
        injury = injure(data, draws)
        (folder / key).write_bytes(injury.data)
        yield key, injury
        (folder / key).write_bytes(data)


# Checkpoints


def values(step: int, kind: str, parameter: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step * 100 + 10 * OPTIMIZER_KINDS.index(kind) + len(parameter))
    return torch.randn(SHAPES[parameter], generator=generator)


def ranks(step: int) -> list[list[Partition]]:
    """Three ranks with a third of every parameter each."""
    return [
        [
            Partition(
                {kind: values(step, kind, name).flatten().chunk(3)[rank] for kind in OPTIMIZER_KINDS},
                (ParameterSlice(name, rank * size // 3, size // 3, 0),),
            )
            for name, size in ((name, int(np.prod(shape))) for name, shape in SHAPES.items())
        ]
        for rank in range(3)
    ]


def write_checkpoints(root: Storage, config: TrainConfig) -> None:
    """Write two attempts with a checkpoint each."""
    for number, checkpoint_id, before in ((1, OLDER, None), (2, NEWEST, OLDER)):
        attempts.claim(root, AttemptRecord(number, before))
        fields = {"config": config.model_dump(mode="json"), "data_sha256": DATA_SHA256}
        checkpoints.write(
            root, checkpoint_id, ranks(30 if number == 1 else 40), model_shapes=SHAPES, **fields
        )


def read_all(checkpoint: Checkpoint) -> None:
    """Check that all values are those that were written."""
    for kind in OPTIMIZER_KINDS:
        for name, tensor in checkpoint.read_whole(kind).items():
            assert torch.equal(tensor, values(checkpoint.manifest.step, kind, name))


def problems(root: Storage) -> list[str]:
    """Return the problems of all attempts and checkpoints."""
    found = []
    for number in attempts.numbers(root):
        try:
            attempts.read(root, number)
        except CheckpointError as error:
            found.append(str(error))
    for checkpoint_id in committed(root):
        try:
            Checkpoint(root, checkpoint_id).verify()
        except CheckpointError as error:
            found.append(str(error))
    return found


def expected(root: Storage, key: str, injury: Injury, whole: tuple[StoredSlice, ...]) -> tuple[str, ...]:
    """Return how the message for this injury may start: any of several damaged tensors may be found first."""
    where = f"{root.url}/{key}"
    if not whole:
        return (f"{where} is damaged",)
    if injury.kind == "end":
        return (f"{where}: expected ",)
    if injury.changed[0] < whole[0].byte_offset:
        return (f"{where}: its header is damaged",)
    hit = [
        s for s in whole if any(s.byte_offset <= byte < s.byte_offset + s.bytes for byte in injury.changed)
    ]
    return tuple(f"{where}: {stored.kind} of {stored.parameter} is damaged" for stored in hit)


def test_injuries_of_checkpoints(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankfile, "BLOCK_BYTES", BLOCK_BYTES)
    root, config = open_storage(tmp_path), TrainConfig(run=str(tmp_path))
    write_checkpoints(root, config)
    assert problems(root) == []
    slices = {
        f"{checkpoint_id.path()}/{file.key}": rankfile.open_file(root, checkpoint_id.path(), file)
        for checkpoint_id in (NEWEST, OLDER)
        for file in Checkpoint(root, checkpoint_id).manifest.files
    }
    keys = [*slices, *(f"{one.path()}/{MANIFEST}" for one in (NEWEST, OLDER))]
    keys += [f"{ATTEMPTS}/{number:04d}.json" for number in (1, 2)]
    counts = Counter[tuple[str, ...]]()
    for key, injury in injured(tmp_path, keys, INJURIES):
        messages = expected(root, key, injury, slices.get(key, ()))
        (problem,) = problems(root)
        assert problem.startswith(messages)
        notes: list[str] = []
        found = find_checkpoint(config, DATA_SHA256, world, read_all, notes.append)
        assert found is not None
        if key.startswith(NEWEST.path()):
            (note,) = notes
            assert found.id == OLDER
            assert note.startswith(tuple(f"skipping checkpoint {NEWEST.path()}: {text}" for text in messages))
        else:
            assert (found.id, notes) == (NEWEST, [])
        part = "header" if "header" in problem else "tensor" if " of " in problem else "whole"
        counts[key.split("/")[0 if key.startswith(ATTEMPTS) else -1].split("-")[0], part, injury.kind] += 1
    tell("checkpoints", counts)


# Data


def read_samples(dataset: LatentDataset) -> tuple[dict[int, bytes], dict[int, str]]:
    """Return sample id => content and sample id => problem, reading one by one as training does."""
    held, wrong, place = {}, {}, np.empty((1, *dataset.info.latent_shape[1:]), np.float16)
    for sample_id in range(len(dataset)):
        try:
            moments, label = dataset.read(sample_id)
            held[sample_id] = moments.tobytes() + bytes([label])
            _, damaged = dataset.read_views(np.array([sample_id]), np.array([1]), place)
            assert not damaged
            assert np.array_equal(place[0], moments[1])
        except DataError as error:
            wrong[sample_id] = str(error)
    return held, wrong


def expected_of_data(dataset: LatentDataset, key: str, injury: Injury) -> tuple[str, set[int], str]:
    """Return (the damaged part, the unreadable samples, the start of the message)."""
    shard = int(Path(key).stem)
    ids = range(SHARD_SAMPLES * shard, min(SHARD_SAMPLES * (shard + 1), SAMPLES))
    url = dataset.storage.url
    if key.endswith(".idx"):
        return "index", {*ids}, f"{url}/{key}: its SHA-256 is not the one in"
    if injury.kind == "end":
        return "tar", {*ids}, f"shard {shard:05d} at {url}/{key}: expected"
    hit = set()
    for sample_id, record in zip(ids, dataset.records(shard), strict=True):
        begin, end = record["offset"], record["offset"] + record["length"]
        if ((injury.changed >= begin) & (injury.changed < end)).any():
            hit.add(sample_id)
    return ("samples" if hit else "beside samples"), hit, f"{url}: shard {shard:05d}, sample "


def test_injuries_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, shards):
        monkeypatch.setattr(module, "RETRY_PAUSES_S", (0.0,))
    write_latents(tmp_path, num=SAMPLES, shard_samples=SHARD_SAMPLES, image_size=64)
    dataset = LatentDataset.open(tmp_path)
    whole, wrong = read_samples(dataset)
    assert not wrong
    assert not [problem for problem in verify(dataset.storage, 1)[1] if "shards/" in problem]
    counts = Counter[tuple[str, ...]]()
    keys = [key for shard in dataset.info.shards for key in (shard.tar_key, shard.tar_key, shard.index_key)]
    for key, injury in injured(tmp_path, keys, INJURIES):
        assert any(problem.startswith(key) for problem in verify(dataset.storage, 1)[1])
        held, wrong = read_samples(LatentDataset.open(tmp_path))
        part, hit, message = expected_of_data(dataset, key, injury)
        assert wrong.keys() == hit
        for sample_id, error in wrong.items():
            named = f"{message}{sample_id}: expected CRC-32C" if part == "samples" else message
            assert error.startswith(named)
        assert held == {sample_id: data for sample_id, data in whole.items() if sample_id not in hit}
        counts[Path(key).suffix, part, injury.kind] += 1
    tell("data", counts)


def tell(what: str, counts: Counter[tuple[str, ...]]) -> None:
    print(f"\n{counts.total()} injuries of {what}, all found")
    for (name, part, kind), count in sorted(counts.items()):
        print(f"  {name:13} {part:15} {kind:5} {count:4}")
