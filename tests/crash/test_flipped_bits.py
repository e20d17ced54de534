"""A flipped bit in any file of a data set or run: readers name it, or it changes nothing.

Every existing file is tried, so a new kind of file needs no new test.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.attempts import AttemptRecord, committed
from dit_scale.checkpoint.manifest import EMA, CheckpointId
from dit_scale.checkpoint.partition import OPTIMIZER_KINDS, Partition
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.cli import main
from dit_scale.config import EncodeConfig, TrainConfig, dump
from dit_scale.data.shards import Quarantined, VaeIdentity
from dit_scale.data.verify import verify
from dit_scale.dist import World
from dit_scale.errors import DataError
from dit_scale.storage import open_storage
from dit_scale.train.restore import find_checkpoint
from dit_scale_pipeline import output
from dit_scale_pipeline.inputs import Listing
from dit_scale_pipeline.inputs.base import Archive
from dit_scale_pipeline.inputs.saved import load_listing, save_listing
from dit_scale_pipeline.shards_writer import IndexRow, build_shard
from tests.support import checkpoints

VAE = VaeIdentity(name="x", weights_sha256="1", scale=1.00287, downsample=8, latent_channels=4)


def flips(path: Path, num: int = 25, last: int = 80) -> Iterator[tuple[int, int]]:
    """Flip `num` bits of a file, and one in each of the `last` bytes with the digests, one bit at a time."""
    whole, draws = path.read_bytes(), np.random.default_rng(len(path.name))
    for at in (*draws.integers(0, len(whole), num).tolist(), *range(max(0, len(whole) - last), len(whole))):
        bit = int(draws.integers(8))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        yield at, bit
    path.write_bytes(whole)


# A data set

LISTING = Listing(
    kind="class_tars",
    class_names=("a", "b"),
    paths=("a/0.png", "a/1.png", "b/0.png", "b/1.png"),
    labels=np.array([0, 0, 1, 1], np.int32),
    archives=(Archive("a.tar", 4096), Archive("b.tar", 4096)),
    archive_numbers=np.array([0, 0, 1, 1], np.int32),
    starts=np.array([0, 1024, 0, 1024], np.int64),
    sizes=np.array([1024] * 4, np.int64),
    ignored=("notes.txt",),
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """All files of an encoding job, written by its own code."""
    storage, config = open_storage(tmp_path), EncodeConfig(source="images", image_size=32, shard_samples=2)
    claimed = output.identity(config, LISTING, VAE) | dict.fromkeys(output.ENCODING_KEYS, "x")
    save_listing(storage, LISTING)
    output.claim(storage, claimed, LISTING)
    moments = np.random.default_rng(0).uniform(0.1, 1, (4, 2, 8, 4, 4)).astype(np.float16)
    rows = [IndexRow(key, LISTING.paths[key], key // 2, moments[key]) for key in (0, 1, 3)]
    torn = Quarantined(key=2, path="b/0.png", reason="torn")
    shards = [build_shard("00000", rows[:2], [], 4), build_shard("00001", rows[2:], [torn], 4)]
    for shard in shards:
        shard.write(storage)
    records = [shard.record for shard in shards]
    output.commit(storage, config, LISTING, vae=VAE, stored=claimed, records=records)
    return tmp_path


def problems(folder: Path) -> list[str]:
    try:
        return verify(open_storage(folder), 1)[1]
    except DataError as error:
        return [str(error)]


def test_a_flipped_bit_of_any_file_of_a_data_set_is_named(data: Path) -> None:
    assert problems(data) == []
    files = sorted(path for path in data.rglob("*") if path.is_file())
    assert len(files) == 3 + 2 * 3
    for path in files:
        for place in flips(path):
            found = problems(data)
            assert any(path.name in problem for problem in found), (path.name, place, found)
    assert problems(data) == []


def test_a_resumed_encoding_job_names_it(data: Path) -> None:
    storage = open_storage(data)

    def start_again() -> None:
        output.read_identity(storage)
        load_listing(storage)
        output.finished_shards(storage)

    start_again()
    for name in ("encode.json", "listing.safetensors", "shards/00000.json", "shards/00001.json"):
        for place in flips(data / name):
            with pytest.raises(DataError) as caught:
                start_again()
            assert f"{name} is damaged" in str(caught.value), (name, place)
    start_again()


# A run

SHAPES = {"w": (30, 20), "b": (20,)}
KINDS = (*OPTIMIZER_KINDS, "ema.power")
NEWEST, OLDER = CheckpointId(40, 2), CheckpointId(30, 1)
DATA_SHA256 = "1" * 64


def owned(step: int) -> list[Partition]:
    numbers = torch.Generator().manual_seed(step)
    return [
        Partition(
            {kind: torch.randn(size, generator=numbers) for kind in KINDS},
            (ParameterSlice(name, 0, size, 0),),
        )
        for name, size in ((name, int(np.prod(shape))) for name, shape in SHAPES.items())
    ]


@pytest.fixture
def run(tmp_path: Path) -> TrainConfig:
    """Two attempts with a checkpoint each, a stored average, and the run's configuration."""
    config = TrainConfig(run=str(tmp_path))
    root = open_storage(tmp_path)
    fields = {
        "config": config.model_dump(mode="json"),
        "data_sha256": DATA_SHA256,
        "model_shapes": SHAPES,
    }
    for number, checkpoint_id, before in ((1, OLDER, None), (2, NEWEST, OLDER)):
        attempts.claim(root, AttemptRecord(number, before))
        checkpoints.write(root, checkpoint_id, [owned(30 + 10 * (number - 1))], **fields)
    checkpoints.write(root, NEWEST, [owned(40)], EMA, **fields)
    root.write("config.yaml", dump(config).encode())
    return config


def test_a_flipped_bit_of_any_file_of_a_run_is_named_or_changes_nothing(
    run: TrainConfig, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    root = open_storage(run.run)

    def resume() -> tuple[CheckpointId, dict[str, bytes], list[str]]:
        """Return the checkpoint that the run would resume from, all its values, and the notes."""
        notes: list[str] = []
        values: dict[str, bytes] = {}

        def fill(checkpoint: Checkpoint) -> None:
            for kind in KINDS:
                for name, tensor in checkpoint.read_whole(kind).items():
                    values[f"{kind} {name}"] = tensor.numpy().tobytes()

        found = find_checkpoint(run, DATA_SHA256, world, fill, notes.append)
        assert found is not None
        return found.id, values, notes

    sound = resume()
    assert sound[::2] == (NEWEST, [])
    files = sorted(path for path in Path(run.run).rglob("*") if path.is_file())
    assert len(files) == 2 + 3 * 2 + 1
    for path in files:
        key = str(path.relative_to(run.run))
        for place in flips(path, num=10, last=8):
            found, values, notes = resume()
            if found == NEWEST:
                assert (values, notes) == sound[1:], (key, place)
            else:
                assert found == OLDER
                assert key.startswith(NEWEST.path())
                assert f"skipping checkpoint {NEWEST.path()}: " in notes[0]
            if key != "config.yaml":
                assert main(["checkpoint", "verify", run.run]) == 1, (key, place)
                assert path.name in capsys.readouterr().out
    assert main(["checkpoint", "verify", run.run]) == 0
    assert committed(root) == [NEWEST, OLDER]
