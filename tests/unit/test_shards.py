"""The bytes of a latent data set: indexes, samples, ids, detected damage, the cache of remote shards."""

import hashlib
import json
import os
import re
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.data import files, shards
from dit_scale.data.files import DamagedError
from dit_scale.data.shards import (
    INFO_KEY,
    RECORD,
    LatentDataset,
    decode_sample,
    encode_sample,
    read_index,
    read_info,
    write_index,
)
from dit_scale.data.statistics import combine_sums
from dit_scale.errors import DataError
from dit_scale.storage import Storage, open_storage
from dit_scale_pipeline.shards_writer import IndexRow, ShardRecord, build_shard
from tests.support.latents import edit_info, write_latents
from tests.support.s3 import BUCKET, s3_server


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, num=40, shard_samples=16)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "set"))


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_known_checksum() -> None:
    assert google_crc32c.value(b"123456789") == 0xE3069283


@given(st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 5), max_size=20))
def test_index_round_trip(rows: list[tuple[int, ...]]) -> None:
    records = np.array(rows, RECORD)
    data = write_index(records)
    assert len(data) == 24 + 24 * len(rows)
    assert np.array_equal(read_index(data), records)


def test_index_bytes_are_as_documented() -> None:
    data = write_index(np.array([(1536, 16512, 7, 42, 0xDEADBEEF)], RECORD))
    body = struct.pack("<QIIII", 1536, 16512, 7, 42, 0xDEADBEEF)
    assert data == b"DITSIDX\n" + struct.pack("<IIII", 1, 1, google_crc32c.value(body), 0) + body


@pytest.mark.parametrize("at", [0, 7, 8, 11, 12, 15, 16, 19, 24, 31, 48, 71])
def test_a_flipped_bit_of_an_index_is_detected(at: int) -> None:
    data = bytearray(write_index(np.array([(1, 2, 3, 4, 5), (6, 7, 8, 9, 10)], RECORD)))
    data[at] ^= 4
    with pytest.raises(DataError, match="here"):
        read_index(bytes(data), "here")
    with pytest.raises(DataError, match="here"):
        read_index(bytes(data[:-1]), "here")


def test_sample_round_trip_shares_the_bytes() -> None:
    moments = np.arange(2 * 8 * 4 * 4, dtype=np.float16).reshape(2, 8, 4, 4)
    npy = encode_sample(moments)
    array = decode_sample(npy, google_crc32c.value(npy))
    assert array.dtype == np.dtype("<f2")
    assert np.array_equal(array, moments)
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_a_sample_is_verified_before_it_is_parsed() -> None:
    npy = encode_sample(np.zeros((2, 8, 4, 4), np.float16))
    with pytest.raises(DataError, match="shard 00001, sample 3: expected CRC-32C"):
        decode_sample(npy, google_crc32c.value(npy) ^ 1, "shard 00001, sample 3")


def test_pickles_and_other_types_are_refused(tmp_path: Path) -> None:
    for array in (np.array([{"a": 1}], dtype=object), np.zeros(3, np.float32), np.zeros((3, 3), "<f2").T):
        np.save(tmp_path / "x.npy", array, allow_pickle=True)
        npy = (tmp_path / "x.npy").read_bytes()
        with pytest.raises(DataError, match="not an npy file of fp16 latents"):
            decode_sample(npy, google_crc32c.value(npy))
    with pytest.raises(DataError, match="not an npy"):
        decode_sample(b"abc", google_crc32c.value(b"abc"))


def test_every_sample_by_id(finished: Path) -> None:
    dataset = LatentDataset.open(finished)
    assert len(dataset) == 40
    labels = dataset.labels()
    for sample_id in range(40):
        moments, label = dataset.read(sample_id)
        assert moments.shape == (2, 8, 4, 4)
        assert label == labels[sample_id] == sample_id % 10
    assert dataset.locate(15) == shards.Location(0, 15)
    assert dataset.locate(16) == shards.Location(1, 0)
    assert dataset.locate(39) == shards.Location(2, 7)
    for sample_id in (-1, 40):
        with pytest.raises(DataError, match="samples 0 to 39"):
            dataset.read(sample_id)


def test_ids_skip_an_empty_shard(copy: Path) -> None:
    empty = build_shard("00003", [], [], 4)
    empty.write(open_storage(copy))
    info = json.loads((copy / INFO_KEY).read_text())
    info["shards"].insert(1, empty.record.model_dump())
    edit_info(copy, shards=info["shards"])
    dataset = LatentDataset.open(copy)
    assert dataset.locate(15).shard == 0
    assert dataset.locate(16) == shards.Location(2, 0)
    assert len(dataset.labels()) == 40


def test_threads_share_a_data_set_with_few_open_shards(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "OPEN_SHARDS", 1)
    dataset = LatentDataset.open(finished)
    expected = [dataset.read(sample_id)[0].copy() for sample_id in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = pool.map(dataset.read, range(40))
            assert all(np.array_equal(a, b) for (a, _), b in zip(found, expected, strict=True))


@pytest.mark.parametrize("at", [700, 3000, -12_000])
def test_a_flipped_bit_of_a_sample_is_an_error_that_names_it(copy: Path, no_pauses: None, at: int) -> None:
    path = copy / "shards/00001.tar"
    record = LatentDataset.open(copy).records(1)[5]
    inside = int(record["offset"]) + at % int(record["length"])
    flip_bit(path, inside)
    dataset = LatentDataset.open(copy)
    dataset.read(20)
    with pytest.raises(DataError, match=r"shard 00001, sample 21: expected CRC-32C"):
        dataset.read(21)


@pytest.mark.parametrize("size_bytes", [-512, 512])
def test_a_shard_of_another_size_is_an_error(copy: Path, size_bytes: int) -> None:
    path = copy / "shards/00002.tar"
    os.truncate(path, path.stat().st_size + size_bytes)
    with pytest.raises(DataError, match=r"shard 00002 at .*: expected \d+ bytes, got"):
        LatentDataset.open(copy).read(39)


def test_an_index_of_another_encoding_is_an_error(copy: Path, no_pauses: None) -> None:
    shutil.copy(copy / "shards/00000.idx", copy / "shards/00001.idx")
    with pytest.raises(DataError, match=r"00001.idx: its SHA-256 is not the one in dataset.json"):
        LatentDataset.open(copy).read(16)


def test_an_unfinished_data_set_is_explained(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a latent data set; make one with"):
        read_info(open_storage(tmp_path / "nothing"))
    edit_info(copy, version=2)
    with pytest.raises(DataError, match=r"format version 2, this program reads 1"):
        read_info(open_storage(copy))
    edit_info(copy, version=1, samples=41)
    with pytest.raises(DataError, match="do not add up to 41"):
        read_info(open_storage(copy))
    edit_info(copy, samples="many")
    with pytest.raises(DataError, match=r"samples: Input should be a valid integer"):
        read_info(open_storage(copy))
    edit_info(copy, format="other")
    with pytest.raises(DataError, match="expected format 'dit-scale latents'"):
        read_info(open_storage(copy))
    (copy / INFO_KEY).write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_info(open_storage(copy))
    (copy / INFO_KEY).unlink()
    (copy / "encode.json").write_text("{}")
    with pytest.raises(DataError, match="its encoding has not finished"):
        read_info(open_storage(copy))


def test_a_shard_is_a_pure_function_of_its_rows(finished: Path) -> None:
    rows = [IndexRow(key, f"{key}.png", key % 3, np.full((2, 8, 2, 2), key, np.float16)) for key in (3, 5, 8)]
    first, second = (build_shard("00000", rows, [], 4) for _ in range(2))
    assert (first.tar, first.index, first.record) == (second.tar, second.index, second.record)
    assert ShardRecord.model_validate_json(first.record.model_dump_json()) == first.record
    with tarfile.open(finished / "shards/00000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:3]] == ["00000000.cls", "00000000.latent.npy", "00000001.cls"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_rows_that_are_not_finite_are_quarantined() -> None:
    moments = np.zeros((2, 8, 2, 2), np.float16)
    moments[1, 3, 0, 0] = np.inf
    good = IndexRow(0, "a.png", 0, np.zeros((2, 8, 2, 2), np.float16))
    record = build_shard("00000", [good, IndexRow(1, "b.png", 0, moments)], [], 4).record
    assert record.samples == 1
    assert [(item.key, item.path) for item in record.quarantined] == [(1, "b.png")]


def test_channel_statistics_are_those_of_posterior_samples() -> None:
    draws = np.random.default_rng(0)
    mean = draws.normal(0.5, 2.0, (30, 2, 4, 4, 4))
    std = draws.uniform(0.1, 1.0, (30, 2, 4, 4, 4))
    moments = np.concatenate([mean, std], axis=2).astype(np.float16)
    parts = [moments[:16], moments[16:]]
    records = [build_shard("0", [IndexRow(0, "", 0, m) for m in part], [], 4).record for part in parts]
    found_mean, found_std = combine_sums([record.sums for record in records], 30, (2, 8, 4, 4))
    samples = mean + std * draws.normal(size=(400, *std.shape))
    assert np.allclose(found_mean, samples.mean(axis=(0, 1, 2, 4, 5)), atol=0.01)
    assert np.allclose(found_std, samples.std(axis=(0, 1, 2, 4, 5)), atol=0.01)


@pytest.fixture
def remote(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        storage = open_storage(f"s3://{BUCKET}/set")
        disk = open_storage(finished)
        for key, _ in disk.list():
            storage.write(key, disk.read(key))
        yield storage


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shards, files):
        monkeypatch.setattr(module, "RETRY_PAUSES_S", (0.0,) * 4)


Change = Callable[[int, bytes], bytes]


def when_reading(storage: Storage, change: Change, method: str) -> list[str]:
    """Pass each answer and its number through `change`. Returns the growing list of requested keys."""
    keys: list[str] = []
    real = getattr(storage, method)

    def read(key: str, *at: int) -> bytes:
        keys.append(key)
        return change(len(keys), real(key, *at))

    setattr(storage, method, read)
    return keys


def flipped(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def test_a_remote_sample_is_read_as_a_range_until_its_shard_is_cached(
    remote: Storage, finished: Path, tmp_path: Path
) -> None:
    here, there = LatentDataset.open(finished), LatentDataset(remote, tmp_path)
    keys = when_reading(remote, lambda _, data: data, "read_range")
    for sample_id in (0, 17, 39, 1):
        moments, label = there.read(sample_id)
        assert np.array_equal(moments, here.read(sample_id)[0])
        assert label == sample_id % 10
    assert [key[-9:] for key in keys] == ["00000.tar", "00001.tar", "00002.tar", "00000.tar"]
    assert list(tmp_path.iterdir()) == []
    there.cache.fetch(there.files.shards[0])
    keys.clear()
    assert np.array_equal(there.read(5)[0], here.read(5)[0])
    assert keys == []


def test_wrong_bytes_are_read_again(remote: Storage, tmp_path: Path, no_pauses: None) -> None:
    dataset = LatentDataset(remote, tmp_path)
    indexes = when_reading(remote, lambda n, data: data if n == 3 else flipped(data), "read")
    ranges = when_reading(remote, lambda n, data: data if n == 3 else flipped(data), "read_range")
    assert dataset.read(20)[1] == 0
    assert (indexes, ranges) == (["shards/00001.idx"] * 3, ["shards/00001.tar"] * 3)


def test_bytes_that_are_wrong_every_time_are_an_error(
    remote: Storage, tmp_path: Path, no_pauses: None
) -> None:
    dataset = LatentDataset(remote, tmp_path)
    ranges = when_reading(remote, lambda _, data: flipped(data), "read_range")
    with pytest.raises(DamagedError, match=r"shard 00001, sample 20: expected CRC-32C .*, 4 times"):
        dataset.read(20)
    assert len(ranges) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, at: flip_bit(path, at),
        lambda path, at: path.write_bytes(bytes(path.stat().st_size)),
        lambda path, at: path.write_bytes(path.read_bytes()[:-1]),
    ],
    ids=["flipped", "zeroed", "truncated"],
)
def test_a_damaged_cached_copy_is_dropped_and_read_from_the_storage(
    remote: Storage, finished: Path, tmp_path: Path, damage: Callable[[Path, int], None]
) -> None:
    expected = LatentDataset.open(finished).read(20)[0]
    dataset = LatentDataset(remote, tmp_path)
    file = dataset.files.shards[1]
    dataset.cache.fetch(file)
    (path,) = tmp_path.iterdir()
    damage(path, int(dataset.records(1)[4]["offset"]) + 300)
    assert np.array_equal(dataset.read(20)[0], expected)
    assert not path.exists()
    assert dataset.cache.fetch(file)
    ranges = when_reading(remote, lambda _, data: data, "read_range")
    assert np.array_equal(dataset.read(20)[0], expected)
    assert ranges == []


def views_of(dataset: LatentDataset, ids: list[int]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    out = np.full((len(ids), 8, 4, 4), np.nan, np.float16)
    labels, damaged = dataset.read_views(np.array(ids), np.arange(len(ids)) % 2, out)
    return out, labels, damaged


@pytest.mark.parametrize("where", ["disk", "storage", "cache", "cache in part"])
def test_reading_many_views_equals_reading_one_sample_at_a_time(
    remote: Storage, finished: Path, tmp_path: Path, where: str
) -> None:
    here = LatentDataset.open(finished)
    dataset = here if where == "disk" else LatentDataset(remote, tmp_path)
    for file in dataset.files.shards[: {"cache": 3, "cache in part": 1}.get(where, 0)]:
        dataset.cache.fetch(file)
    ids = [3, 39, 16, 3, 15, 0, 22]
    out, labels, damaged = views_of(dataset, ids)
    assert damaged == {}
    assert labels.tolist() == [sample_id % 10 for sample_id in ids]
    for row, sample_id in enumerate(ids):
        assert np.array_equal(out[row], here.read(sample_id)[0][row % 2])


def test_damaged_samples_among_many_are_named(copy: Path, no_pauses: None) -> None:
    whole = LatentDataset.open(copy)
    expected = views_of(whole, [5, 21, 30, 21, 16])
    flip_bit(copy / "shards/00001.tar", int(whole.records(1)[5]["offset"]) + 100)
    dataset = LatentDataset.open(copy)
    out, labels, damaged = views_of(dataset, [5, 21, 30, 21, 16])
    assert list(damaged) == [21]
    assert "shard 00001, sample 21: expected CRC-32C" in damaged[21]
    assert labels.tolist() == expected[1].tolist()
    for row in (0, 2, 4):
        assert np.array_equal(out[row], expected[0][row])


def test_an_array_with_another_header_can_be_read(tmp_path: Path) -> None:
    """Other programs may write the same array with more padding or another order of the keys."""
    moments = np.arange(2 * 8 * 4 * 4).reshape(2, 8, 4, 4).astype("<f2")
    header = "{'shape': (2, 8, 4, 4), 'fortran_order': False, 'descr': '<f2'}"
    npys = [
        b"\x93NUMPY\x01\x00%c\x00%s\n" % (size, header.ljust(size - 1).encode()) + moments.tobytes()
        for size in (118, 182)
    ]
    write_latents(tmp_path, num=2)
    info = json.loads((tmp_path / INFO_KEY).read_text())
    records = [(0, len(npys[0]), 4, 0, google_crc32c.value(npys[0]))]
    records.append((len(npys[0]), len(npys[1]), 5, 1, google_crc32c.value(npys[1])))
    index, tar = write_index(np.array(records, RECORD)), b"".join(npys)
    (tmp_path / "shards/00000.tar").write_bytes(tar)
    (tmp_path / "shards/00000.idx").write_bytes(index)
    info["shards"][0] |= {"bytes": len(tar), "index_sha256": hashlib.sha256(index).hexdigest()}
    edit_info(tmp_path, shards=info["shards"])
    out, labels, damaged = views_of(LatentDataset.open(tmp_path), [0, 1])
    assert damaged == {}
    assert labels.tolist() == [4, 5]
    assert np.array_equal(out, moments)


def test_the_current_read_is_reported(copy: Path) -> None:
    dataset = LatentDataset.open(copy)
    assert dataset.waits_for() == ""
    seen: list[str] = []
    when_reading(dataset.storage, lambda _, data: (seen.append(dataset.waits_for()), data)[1], "read")
    dataset.read(17)
    assert len(seen) == 1
    assert re.fullmatch(r".*/shards/00001.idx for \d+\.\d s", seen[0])
    with dataset.files.waits_for(17):
        assert re.fullmatch(r"shard 00001, sample 17 for \d+\.\d s", dataset.waits_for())
    assert dataset.waits_for() == ""
