"""The latent data set's bytes: indexes, samples, ids, damage that is found, the cache of remote shards."""

import json
import shutil
import struct
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.shards_writer import Row, ShardRecord, build_shard, combine_sums
from dit_scale.data import shards
from dit_scale.data.cache import ShardCache
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
from dit_scale.errors import DataError
from dit_scale.storage import Storage, open_storage
from tests.latents import write_latents
from tests.s3 import BUCKET, s3_server


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


def edit_info(folder: Path, **changes: object) -> None:
    info = json.loads((folder / INFO_KEY).read_text())
    (folder / INFO_KEY).write_text(json.dumps(info | changes))


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
def test_a_flipped_bit_of_an_index_is_found(at: int) -> None:
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


def test_a_sample_is_checked_before_it_is_understood() -> None:
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
    empty.put(open_storage(copy))
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
    monkeypatch.setattr(shards, "OPEN_SHARDS", 1)
    dataset = LatentDataset.open(finished)
    expected = [dataset.read(sample_id)[0].copy() for sample_id in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = pool.map(dataset.read, range(40))
            assert all(np.array_equal(a, b) for (a, _), b in zip(found, expected, strict=True))


@pytest.mark.parametrize("at", [700, 3000, -12_000])
def test_a_flipped_bit_of_a_sample_is_an_error_that_names_it(copy: Path, at: int) -> None:
    path = copy / "shards/00001.tar"
    record = LatentDataset.open(copy).records(1)[5]
    inside = int(record["offset"]) + at % int(record["length"])
    flip_bit(path, inside)
    dataset = LatentDataset.open(copy)
    dataset.read(20)
    with pytest.raises(DataError, match=r"shard 00001, sample 21: expected CRC-32C"):
        dataset.read(21)


def test_a_truncated_shard_is_an_error(copy: Path) -> None:
    path = copy / "shards/00002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard 00002 at .*: expected \d+ bytes, got"):
        LatentDataset.open(copy).read(39)


def test_an_index_of_another_encoding_is_an_error(copy: Path) -> None:
    shutil.copy(copy / "shards/00000.idx", copy / "shards/00001.idx")
    with pytest.raises(DataError, match=r"00001.idx: its SHA-256 is not the one in dataset.json"):
        LatentDataset.open(copy).read(16)


def test_what_is_no_finished_data_set_says_so(copy: Path, tmp_path: Path) -> None:
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
    rows = [Row(key, f"{key}.png", key % 3, np.full((2, 8, 2, 2), key, np.float16)) for key in (3, 5, 8)]
    first, second = (build_shard("00000", rows, [], 4) for _ in range(2))
    assert (first.tar, first.index, first.record) == (second.tar, second.index, second.record)
    assert ShardRecord.model_validate_json(first.record.model_dump_json()) == first.record
    with tarfile.open(finished / "shards/00000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:3]] == ["00000000.cls", "00000000.latent.npy", "00000001.cls"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_rows_that_are_not_finite_join_the_quarantine() -> None:
    moments = np.zeros((2, 8, 2, 2), np.float16)
    moments[1, 3, 0, 0] = np.inf
    good = Row(0, "a.png", 0, np.zeros((2, 8, 2, 2), np.float16))
    record = build_shard("00000", [good, Row(1, "b.png", 0, moments)], [], 4).record
    assert record.samples == 1
    assert [(item.key, item.path) for item in record.quarantined] == [(1, "b.png")]


def test_channel_statistics_are_those_of_posterior_samples() -> None:
    draws = np.random.default_rng(0)
    mean = draws.normal(0.5, 2.0, (30, 2, 4, 4, 4))
    std = draws.uniform(0.1, 1.0, (30, 2, 4, 4, 4))
    moments = np.concatenate([mean, std], axis=2).astype(np.float16)
    parts = [moments[:16], moments[16:]]
    records = [build_shard("0", [Row(0, "", 0, m) for m in part], [], 4).record for part in parts]
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


def test_remote_shards_are_cached_verified_and_fetched_once(
    remote: Storage, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[str] = []
    real = remote.read_range
    monkeypatch.setattr(remote, "read_range", lambda key, *at: (ranges.append(key), real(key, *at))[1])
    here, there = LatentDataset.open(finished), LatentDataset(remote, tmp_path)
    for sample_id in (0, 17, 39, 1):
        assert np.array_equal(here.read(sample_id)[0], there.read(sample_id)[0])
    info = there.info.shards[0]
    barrier = threading.Barrier(4)

    def fetch(_: int) -> Path:
        barrier.wait()
        return ShardCache(remote, tmp_path / "other").path(info.tar_key, info.bytes, info.sha256)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(fetch, range(4)))) == 1
    assert ranges == [shard.tar_key for shard in there.info.shards] + [info.tar_key]


def test_a_damaged_remote_shard_never_enters_the_cache(remote: Storage, tmp_path: Path) -> None:
    key = "shards/00000.tar"
    data = bytearray(remote.read(key))
    data[5000] ^= 1
    remote.write(key, bytes(data))
    with pytest.raises(DataError, match=r"00000.tar: expected SHA-256 .* the shard is damaged"):
        LatentDataset(remote, tmp_path).read(0)
    remote.write(key, bytes(data[:-512]))
    with pytest.raises(DataError, match=r"00000.tar: expected \d+ bytes as in dataset.json"):
        LatentDataset(remote, tmp_path).read(0)
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot use .* as cache: .*; set data.cache_dir"):
        LatentDataset(remote, tmp_path / "file" / "folder").read(0)
