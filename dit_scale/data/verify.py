"""Verification of a latent data set, from the first byte to the last.

Checks the digests of every tar and index, the members of the tars against the indexes, the checksum, shape
and label of every sample, the counts, the quarantined inputs, the channel statistics, and the files that the
encoding job left. Holds only the shards in memory that it reads concurrently.
"""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dit_scale.data.listing import LISTING_KEY, unpack
from dit_scale.data.shards import (
    IDENTITY_KEY,
    INFO_KEY,
    RECORD_DIGEST,
    DatasetInfo,
    Records,
    ShardInfo,
    decode_sample,
    read_index,
    read_info,
)
from dit_scale.data.statistics import channel_sums, combine_sums
from dit_scale.errors import DataError, StorageError
from dit_scale.sealed import unseal_any
from dit_scale.storage import MissingKeyError, Storage, UnavailableError

STATISTICS_TOLERANCE = 1e-6
"""Largest difference of channel statistics: another version of NumPy may sum in another order."""


def verify(
    storage: Storage,
    threads: int = 4,
    console: Console | None = None,
    say: Callable[[str], object] = lambda note: None,
) -> tuple[DatasetInfo, list[str]]:
    """Return dataset.json and all problems. Reads `threads` shards concurrently and holds them in memory.

    Shows a progress bar if the console is a terminal; reports notes that are not problems to `say`. Raises
    DataError if there is no finished data set, UnavailableError if the storage does not answer: an unreadable
    data set may be intact.
    """
    info = read_info(storage, say)
    problems, totals = [*_description(info), *_job_files(storage)], _Totals(info)
    bar = Progress(
        TextColumn("verifying"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console is None or not console.is_terminal,
    )
    task = bar.add_task("verifying", total=sum(shard.bytes for shard in info.shards))

    def verify_one(shard: ShardInfo) -> _ShardReport:
        report = _verify_shard(storage, info, shard)
        bar.advance(task, shard.bytes)
        return report

    with bar, ThreadPoolExecutor(threads) as pool:
        for report in pool.map(verify_one, info.shards):
            problems += report.problems
            totals.add(report)
    return info, problems + list(totals.problems())


def sound(info: DatasetInfo) -> str:
    """Describe a data set without problems."""
    return (
        f"sound: {info.samples} samples in {len(info.shards)} shards, {info.num_classes} classes, "
        f"{len(info.quarantined)} of {info.source.count} inputs quarantined"
    )


@dataclass
class _ShardReport:
    """The result of reading one shard."""

    num_channels: int
    problems: list[str] = field(default_factory=list)
    keys: npt.NDArray[np.int64] | None = None
    """None if the index could not be read."""
    sums: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = np.zeros((2, self.num_channels))


def _description(info: DatasetInfo) -> Iterator[str]:
    """Yield contradictions within dataset.json."""
    views, channels, height, width = info.latent_shape
    expected = (len(info.views), 2 * info.vae.latent_channels, info.image_size, info.image_size)
    if (views, channels, height * info.vae.downsample, width * info.vae.downsample) != expected:
        yield (
            f"{INFO_KEY}: latent_shape {info.latent_shape} does not match {len(info.views)} views of "
            f"{info.image_size} px images and a VAE of {info.vae.latent_channels} channels that divides "
            f"sides by {info.vae.downsample}"
        )


def _job_files(storage: Storage) -> Iterator[str]:
    """Yield problems of the encoding job's identity and listing, if they exist; training ignores them."""
    for key in (IDENTITY_KEY, LISTING_KEY):
        where = f"{storage.url}/{key}"
        try:
            data = storage.read(key)
            unpack(data, where) if key == LISTING_KEY else unseal_any(data, where, DataError)
        except MissingKeyError:
            continue
        except DataError as error:
            yield str(error)


def _record(storage: Storage, shard: ShardInfo) -> Iterator[str]:
    """Check the encoding job's record of a shard, if it exists: it must agree with dataset.json."""
    where = f"{storage.url}/{shard.record_key}"
    try:
        tree, _ = unseal_any(storage.read(shard.record_key), where, DataError, RECORD_DIGEST)
        recorded = ShardInfo.model_validate(tree)
    except MissingKeyError:
        return
    except (DataError, ValidationError) as error:
        yield f"{shard.record_key}: damaged ({error})"
        return
    if recorded != shard:
        yield f"{shard.record_key}: it does not agree with {INFO_KEY}"


def _verify_shard(storage: Storage, info: DatasetInfo, shard: ShardInfo) -> _ShardReport:
    """Verify digests, members, checksums, shapes and labels of one shard."""
    report = _ShardReport(info.latent_shape[1] // 2)
    try:
        tar, index = storage.read(shard.tar_key), storage.read(shard.index_key)
        if len(tar) != shard.bytes:
            report.problems.append(
                f"{shard.tar_key}: expected {shard.bytes} bytes as in {INFO_KEY}, got {len(tar)}"
            )
        for key, data, sha256 in (
            (shard.tar_key, tar, shard.sha256),
            (shard.index_key, index, shard.index_sha256),
        ):
            if hashlib.sha256(data).hexdigest() != sha256:
                report.problems.append(f"{key}: its SHA-256 is not the one in {INFO_KEY}")
        records = read_index(index, shard.index_key)
    except UnavailableError:
        raise
    except (StorageError, DataError) as error:
        report.problems.append(str(error))
        return report
    if len(records) != shard.samples:
        report.problems.append(
            f"{shard.index_key}: expected {shard.samples} records as in {INFO_KEY}, got {len(records)}"
        )
    report.keys = records["key"].astype(np.int64)
    report.problems += _record(storage, shard)
    report.problems += _members(shard, tar, records)
    report.problems += _samples(report, info, shard, tar, records)
    return report


def _members(shard: ShardInfo, tar: bytes, records: Records) -> Iterator[str]:
    """Check the tar as any reader sees it: each record's label, then its array at the recorded offset."""
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
        yield f"{shard.tar_key}: not a complete tar ({error})"
    if found != expected:
        wrong = [a for a, b in zip(found, expected, strict=False) if a != b]
        yield (
            f"{shard.tar_key}: its members do not match the index: expected {len(expected)}, got {len(found)}"
            + (f"; first mismatch {wrong[0]}" if wrong else "")
        )


def _samples(
    report: _ShardReport, info: DatasetInfo, shard: ShardInfo, tar: bytes, records: Records
) -> Iterator[str]:
    for record in records:
        where = f"{shard.tar_key}, sample with key {record['key']:08d}"
        npy = tar[int(record["offset"]) : int(record["offset"]) + int(record["length"])]
        try:
            moments = decode_sample(npy, int(record["crc32c"]), where)
        except DataError as error:
            yield str(error)
            continue
        if moments.shape != info.latent_shape:
            yield f"{where}: expected shape {info.latent_shape} as in {INFO_KEY}, got {moments.shape}"
            continue
        if not np.isfinite(moments).all():
            yield f"{where}: some values are not finite"
        if record["label"] >= info.num_classes:
            yield f"{where}: expected a label below {info.num_classes}, got {record['label']}"
        report.sums += channel_sums(moments)


class _Totals:
    """The totals of the data set, collected shard by shard in order."""

    def __init__(self, info: DatasetInfo) -> None:
        self._info = info
        self._quarantined = np.array([item.key for item in info.quarantined], dtype=np.int64)
        self._num_samples, self._last_key = 0, -1
        self._in_order = self._disjoint = self._indexes_read = self._shards_sound = True
        self._sums = np.zeros((2, info.latent_shape[1] // 2))

    def add(self, report: _ShardReport) -> None:
        """Add the next shard."""
        self._shards_sound &= not report.problems
        self._sums += report.sums
        if report.keys is None:
            self._indexes_read = False
        elif len(report.keys):
            self._in_order &= bool((np.diff(report.keys, prepend=self._last_key) > 0).all())
            self._disjoint &= not np.isin(report.keys, self._quarantined).any()
            self._num_samples += len(report.keys)
            self._last_key = int(report.keys[-1])

    def problems(self) -> Iterator[str]:
        """Yield the problems of the totals, after all shards were added."""
        info = self._info
        if not self._in_order:
            yield "keys: expected every key once and in the order of the listing"
        if self._indexes_read and not self._is_complete():
            yield (
                f"count: {self._num_samples} samples and {len(self._quarantined)} quarantined inputs "
                f"do not make up the {info.source.count} files of the source"
            )
        if not self._num_samples:
            yield "count: no samples"
        elif self._shards_sound:  # wrong statistics of damaged samples are no second problem
            mean, std = combine_sums([self._sums], self._num_samples, info.latent_shape)
            for name, here, there in (("mean", mean, info.channel_mean), ("std", std, info.channel_std)):
                if len(here) != len(there) or not np.allclose(here, there, rtol=0, atol=STATISTICS_TOLERANCE):
                    yield f"channel {name}: expected {there} as in {INFO_KEY}, got {here}"

    def _is_complete(self) -> bool:
        """Whether each image in the source's listing has either a sample or a reason."""
        count, keys = self._info.source.count, [self._last_key, *self._quarantined.tolist()]
        return (
            self._num_samples + len(self._quarantined) == count
            and self._disjoint
            and len(np.unique(self._quarantined)) == len(self._quarantined)
            and min(self._quarantined, default=0) >= 0
            and max(keys) < count
        )
