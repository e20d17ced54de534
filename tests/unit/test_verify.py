"""Verification of a data set: sound data, every kind of damage, and the memory that it needs."""

import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dit_scale.data.shards import INFO_KEY, LatentDataset, read_info
from dit_scale.data.verify import sound, verify
from dit_scale.errors import DataError
from dit_scale.storage import DiskStorage, UnavailableError, open_storage
from tests.support.latents import edit_info, write_latents


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, num=20, shard_samples=6)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "set"))


def problems(folder: Path) -> list[str]:
    return verify(open_storage(folder), 2)[1]


def test_a_sound_data_set(finished: Path) -> None:
    info, found = verify(open_storage(finished), 2)
    assert found == []
    assert sound(info) == "sound: 20 samples in 4 shards, 10 classes, 0 of 20 inputs quarantined"


def test_statistics_equal_those_of_all_samples_together(finished: Path) -> None:
    dataset = LatentDataset.open(finished)
    moments = np.stack([dataset.read(sample_id)[0] for sample_id in range(len(dataset))])
    mean, std = np.split(moments.astype(np.float64), 2, axis=2)
    axes = (0, 1, 3, 4)
    # the variance of the means plus that of each posterior
    variance = mean.var(axis=axes) + (std**2).mean(axis=axes)
    assert np.allclose(dataset.info.channel_mean, mean.mean(axis=axes), rtol=0, atol=1e-8)
    assert np.allclose(dataset.info.channel_std, np.sqrt(variance), rtol=0, atol=1e-8)


def test_quarantined_inputs_fill_the_gaps_between_samples(tmp_path: Path) -> None:
    write_latents(tmp_path, num=20, shard_samples=6)
    item = {"key": 20, "path": "a.png", "reason": "no picture"}
    source = json.loads((tmp_path / INFO_KEY).read_text())["source"]
    edit_info(tmp_path, quarantined=[item], source=source | {"count": 21})
    assert problems(tmp_path) == []


def test_one_view(tmp_path: Path) -> None:
    write_latents(tmp_path, num=5, views=1)
    assert problems(tmp_path) == []


# Damage


def flip_bit(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_of_a_sample(copy: Path) -> None:
    record = LatentDataset.open(copy).records(1)[2]
    flip_bit(copy / "shards/00001.tar", int(record["offset"]) + 300)
    digest, sample = problems(copy)
    assert digest == "shards/00001.tar: its SHA-256 is not the one in dataset.json"
    assert sample.startswith("shards/00001.tar, sample with key 00000008: expected CRC-32C")


def test_a_flipped_bit_of_a_label(copy: Path) -> None:
    record = LatentDataset.open(copy).records(1)[2]
    flip_bit(copy / "shards/00001.tar", int(record["offset"]) - 1024)
    digest, members = problems(copy)
    assert digest == "shards/00001.tar: its SHA-256 is not the one in dataset.json"
    assert "its members do not match the index: expected 12, got 12" in members
    assert members.endswith("first mismatch ('00000008.cls', None, b'9')")


def test_a_tar_that_ends_early(copy: Path) -> None:
    path = copy / "shards/00003.tar"
    path.write_bytes(path.read_bytes()[:1400])
    size, digest, members, *samples = problems(copy)
    assert size == "shards/00003.tar: expected 10240 bytes as in dataset.json, got 1400"
    assert digest.startswith("shards/00003.tar: its SHA-256")
    assert members == "shards/00003.tar: its members do not match the index: expected 4, got 1"
    assert [sample.partition(":")[0] for sample in samples] == [
        f"shards/00003.tar, sample with key {key:08d}" for key in (18, 19)
    ]


@pytest.mark.parametrize("name", ["00002.tar", "00002.idx"])
def test_a_missing_file_is_named_once(copy: Path, name: str) -> None:
    (copy / "shards" / name).unlink()
    assert problems(copy) == [f"cannot read {copy}/shards/{name}: not found"]


def test_an_index_of_another_shard(copy: Path) -> None:
    shutil.copy(copy / "shards/00003.idx", copy / "shards/00001.idx")
    digest, count, *rest = problems(copy)
    assert digest == "shards/00001.idx: its SHA-256 is not the one in dataset.json"
    assert count == "shards/00001.idx: expected 6 records as in dataset.json, got 2"
    assert "keys: expected every key once and in the order of the listing" in rest


TOO_LARGE = "expected a label below 2, got 2"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"class_names": ["0", "1"]}, f"shards/00000.tar, sample with key 00000002: {TOO_LARGE}"),
        ({"channel_mean": [0.0] * 4}, "channel mean: expected (0.0, 0.0, 0.0, 0.0) as in dataset.json, got"),
        ({"channel_std": [1.0] * 3}, "channel std: expected (1.0, 1.0, 1.0) as in dataset.json, got"),
        ({"image_size": 64}, "dataset.json: latent_shape (2, 8, 4, 4) does not match 2 views of 64 px"),
        ({"views": ["image"]}, "dataset.json: latent_shape (2, 8, 4, 4) does not match 1 views"),
        ({"latent_shape": [2, 8, 2, 8]}, "dataset.json: latent_shape (2, 8, 2, 8) does not match"),
        (
            {"quarantined": [{"key": 20, "path": "a", "reason": "b"}]},
            "count: 20 samples and 1 quarantined inputs do not make up the 20 files of the source",
        ),
    ],
)  # fmt: skip
def test_dataset_json_must_match_the_data(copy: Path, change: dict[str, Any], expected: str) -> None:
    edit_info(copy, **change)
    assert problems(copy)[0].startswith(expected)


@pytest.mark.parametrize("keys", [[21], [19, 20], [20, 20], [20, 22], [-1, 20]])
def test_every_input_has_a_sample_or_a_reason_and_none_has_both(copy: Path, keys: list[int]) -> None:
    quarantined = [{"key": key, "path": "a.png", "reason": "no picture"} for key in keys]
    source = json.loads((copy / INFO_KEY).read_text())["source"]
    edit_info(copy, quarantined=quarantined, source=source | {"count": 22})
    (problem,) = problems(copy)
    assert problem.startswith(
        f"count: 20 samples and {len(keys)} quarantined inputs do not make up the 22 files"
    )


def test_shards_out_of_order(copy: Path) -> None:
    info = json.loads((copy / INFO_KEY).read_text())
    edit_info(copy, shards=[info["shards"][number] for number in (1, 0, 2, 3)])
    assert problems(copy) == ["keys: expected every key once and in the order of the listing"]


def test_no_samples(tmp_path: Path) -> None:
    write_latents(tmp_path, num=0)
    assert problems(tmp_path) == ["count: no samples"]


def test_a_flipped_bit_of_dataset_json_is_refused(copy: Path) -> None:
    path = copy / INFO_KEY
    whole, draws = path.read_bytes(), np.random.default_rng(0)
    ends = range(len(whole) - 80, len(whole))  # the digest and its key
    for at in (*draws.integers(0, len(whole), 300).tolist(), *ends):
        flip_bit(path, at, int(draws.integers(8)))
        with pytest.raises(DataError, match=r"dataset\.json is damaged .*\. Copy it again"):
            verify(open_storage(copy), 1)
        path.write_bytes(whole)


def test_dataset_json_of_an_earlier_version_is_read_with_a_note(copy: Path) -> None:
    tree = json.loads((copy / INFO_KEY).read_text())
    del tree["sha256"]
    (copy / INFO_KEY).write_text(json.dumps(tree, indent=1) + "\n")
    notes: list[str] = []
    assert verify(open_storage(copy), 1, say=notes.append)[1] == []
    assert LatentDataset.open(copy).notes == notes
    (note,) = notes
    assert note.startswith(f"{copy}/dataset.json has no digest, because")


def test_an_unfinished_data_set(copy: Path) -> None:
    (copy / INFO_KEY).unlink()
    with pytest.raises(DataError, match="not a latent data set"):
        verify(open_storage(copy))


class Refusing(DiskStorage):
    """A storage that does not answer for one key."""

    def read(self, key: str) -> bytes:
        if key == "shards/00002.idx":
            raise UnavailableError("no answer")
        return super().read(key)


def test_an_unavailable_storage_is_no_damage(finished: Path) -> None:
    with pytest.raises(UnavailableError, match="no answer"):
        verify(Refusing(finished), 2)


# Resources


class Counted(bytes):
    """The bytes of a tar, counting the instances in memory."""

    lock = threading.Lock()
    alive = most = 0

    def __init__(self, _: bytes) -> None:
        with Counted.lock:
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        with Counted.lock:
            Counted.alive -= 1


class Counting(DiskStorage):
    """A folder that counts the tars in memory; reads wait until every thread wants one."""

    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__(folder)
        self.together = threading.Barrier(threads)

    def read(self, key: str) -> bytes:
        data = super().read(key)
        if not key.endswith(".tar"):
            return data
        counted = Counted(data)
        self.together.wait(timeout=60)
        return counted


@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_shards_in_memory_as_threads(finished: Path, threads: int) -> None:
    Counted.alive = Counted.most = 0
    assert verify(Counting(finished, threads), threads)[1] == []
    assert (Counted.alive, Counted.most) == (0, threads)


def test_a_progress_bar_only_on_a_terminal(finished: Path) -> None:
    said = io.StringIO()
    verify(open_storage(finished), 2, Console(file=said))
    assert said.getvalue() == ""
    verify(open_storage(finished), 2, Console(file=said, force_terminal=True, width=80))
    size = sum(shard.bytes for shard in read_info(open_storage(finished)).shards)
    assert f"{size / 1000:.1f}/{size / 1000:.1f} kB" in said.getvalue()
