"""Read a latent data set again from the first byte to the last and say what is wrong with it.

    python data_pipeline/verify.py URL

Digests of every tar and index, the tar's members against the index, checksum, shape and label of every
sample, the counts, the quarantine and the channel statistics. Exit code 1 when anything does not fit.
"""

import argparse
import hashlib
import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

# Found also where the package is not installed; as a script, Python looks beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt

from data_pipeline.shards_writer import channel_sums, combine_sums
from dit_scale.data.shards import (
    INFO_KEY,
    DatasetInfo,
    Records,
    ShardInfo,
    decode_sample,
    read_index,
    read_info,
)
from dit_scale.errors import DataError, DitScaleError, StorageError
from dit_scale.storage import Storage, open_storage

STATISTICS_TOLERANCE = 1e-6
"""Largest difference of channel statistics: another NumPy may add in another order."""


@dataclass
class ShardReport:
    """What was read of one shard."""

    problems: list[str] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    sums: npt.NDArray[np.float64] | None = None


def verify(storage: Storage, threads: int = 4) -> tuple[DatasetInfo, list[str]]:
    """dataset.json and everything that is wrong; DataError when there is no finished data set."""
    info = read_info(storage)
    with ThreadPoolExecutor(threads) as pool:
        reports = list(pool.map(lambda shard: verify_shard(storage, info, shard), info.shards))
    problems = [problem for report in reports for problem in report.problems]
    return info, problems + list(_whole_set(info, reports))


def verify_shard(storage: Storage, info: DatasetInfo, shard: ShardInfo) -> ShardReport:
    """Digests, members, checksums, shapes and labels of one shard."""
    report = ShardReport()
    try:
        tar, index = storage.read(shard.tar_key), storage.read(shard.index_key)
        for key, data, sha256 in (
            (shard.tar_key, tar, shard.sha256),
            (shard.index_key, index, shard.index_sha256),
        ):
            if hashlib.sha256(data).hexdigest() != sha256:
                report.problems.append(f"{key}: its SHA-256 is not the one in {INFO_KEY}")
        records = read_index(index, shard.index_key)
    except (StorageError, DataError) as error:
        report.problems.append(str(error))
        return report
    if len(records) != shard.samples:
        report.problems.append(f"{shard.index_key}: {len(records)} records, {INFO_KEY} says {shard.samples}")
    report.keys = records["key"].tolist()
    report.problems += _members(shard, tar, records)
    report.problems += _samples(report, info, shard, tar, records)
    return report


def _members(shard: ShardInfo, tar: bytes, records: Records) -> Iterator[str]:
    """The tar as any reader sees it: for each record its label, then its array, at the place it names."""
    expected: list[tuple[str, int | None, bytes | None]] = []
    for record in records:
        expected.append((f"{record['key']:08d}.cls", None, str(record["label"]).encode()))
        expected.append((f"{record['key']:08d}.latent.npy", int(record["offset"]), None))
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(tar)) as members:
            for member in members:
                is_label = member.name.endswith(".cls")
                text = tar[member.offset_data : member.offset_data + member.size] if is_label else None
                found.append((member.name, None if is_label else member.offset_data, text))
    except tarfile.TarError as error:
        yield f"{shard.tar_key}: not a whole tar ({error})"
    if found != expected:
        wrong = next((a for a, b in zip(found, expected, strict=False) if a != b), None)
        yield f"{shard.tar_key}: members do not fit the index: {len(found)} of {len(expected)}, first {wrong}"


def _samples(
    report: ShardReport, info: DatasetInfo, shard: ShardInfo, tar: bytes, records: Records
) -> Iterator[str]:
    sums = np.zeros((2, info.vae.latent_channels))
    for record in records:
        where = f"{shard.tar_key}, sample with key {record['key']:08d}"
        npy = tar[int(record["offset"]) : int(record["offset"]) + int(record["length"])]
        try:
            moments = decode_sample(npy, int(record["crc32c"]), where)
        except DataError as error:
            yield str(error)
            continue
        if moments.shape != info.latent_shape:
            yield f"{where}: shape {moments.shape}, {INFO_KEY} says {info.latent_shape}"
            continue
        if not np.isfinite(moments).all():
            yield f"{where}: not finite"
        if record["label"] >= info.num_classes:
            yield f"{where}: label {record['label']} of {info.num_classes} classes"
        sums += channel_sums(moments)
    report.sums = sums


def _whole_set(info: DatasetInfo, reports: Sequence[ShardReport]) -> Iterator[str]:
    keys = [key for report in reports for key in report.keys]
    if keys != sorted(set(keys)):
        yield "keys: expected every one once and in the order of the listing"
    everything = sorted(keys + [item.key for item in info.quarantined])
    if everything != list(range(info.source.count)):
        yield (
            f"count: {len(keys)} samples and {len(info.quarantined)} quarantined inputs "
            f"do not make up the {info.source.count} files of the source"
        )
    sums = [report.sums for report in reports if report.sums is not None]
    if len(sums) < len(reports) or any(report.problems for report in reports):
        return  # the statistics of damaged samples would only repeat what was said
    mean, std = combine_sums(sums, len(keys), info.latent_shape)
    for name, here, there in (("mean", mean, info.channel_mean), ("std", std, info.channel_std)):
        if not np.allclose(here, there, rtol=0, atol=STATISTICS_TOLERANCE):
            yield f"channel {name}: {here} here, {there} in {INFO_KEY}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 sound, 1 damaged, 2 no finished data set."""
    parser = argparse.ArgumentParser(description="Verify a latent data set completely.")
    parser.add_argument("url", help="its folder or s3:// prefix")
    parser.add_argument("--threads", type=int, default=4, help="shards read at once, each is held in memory")
    options = parser.parse_args(arguments)
    try:
        info, problems = verify(open_storage(options.url), options.threads)
    except DitScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"wrong: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(
        f"sound: {info.samples} samples in {len(info.shards)} shards, {info.num_classes} classes, "
        f"{len(info.quarantined)} of {info.source.count} inputs quarantined"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
