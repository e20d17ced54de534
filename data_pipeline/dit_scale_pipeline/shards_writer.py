"""One shard: a deterministic WebDataset tar, its index and its record, from the latents of a slice.

The record, shards/<name>.json, is written last and commits the shard: a shard without a record is encoded
again. The bytes do not depend on who encoded the shard, when or how often. Several processes may therefore
write the same shard: each object is written once, and a later writer must produce the same bytes.

Shapes: V views, C latent channels, h w latent sides.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np
import numpy.typing as npt

from dit_scale.data.shards import (
    INDEX_HEADER,
    RECORD,
    RECORD_DIGEST,
    Quarantined,
    ShardInfo,
    encode_sample,
    write_index,
)
from dit_scale.data.statistics import channel_sums
from dit_scale.errors import DataError
from dit_scale.sealed import sealed
from dit_scale.storage import Storage, open_storage
from dit_scale_pipeline.decoder import DecodedBatch
from dit_scale_pipeline.inputs.names import to_utf8

TAR_HEADER_BYTES = 512


@dataclass(frozen=True)
class IndexRow:
    """One sample of a shard: index in the listing, path, label, moments (V, 2C, h, w)."""

    key: int
    path: str
    label: int
    moments: npt.NDArray[np.float16]


class ShardRecord(ShardInfo):
    """The facts about a shard that dataset.json needs, stored next to it."""

    quarantined: tuple[Quarantined, ...]
    latent_sum: tuple[float, ...]
    """Per latent channel: sum of the means over samples, views and positions."""
    latent_square_sum: tuple[float, ...]
    """Per latent channel: sum of mean^2 + std^2, the expected square of a posterior sample."""

    @property
    def sums(self) -> npt.NDArray[np.float64]:
        """Both sums as (2, C), equal to `channel_sums` of all samples."""
        return np.array([self.latent_sum, self.latent_square_sum])

    @property
    def index_bytes(self) -> int:
        return INDEX_HEADER.size + RECORD.itemsize * self.samples


def shard_name(number: int) -> str:
    """Return the name of shard `number`, which holds entries [n * shard_samples, (n + 1) * shard_samples)."""
    return f"{number:05d}"


@dataclass(frozen=True)
class Shard:
    """A shard in memory."""

    record: ShardRecord
    tar: bytes
    index: bytes

    def write(self, storage: Storage) -> None:
        """Write the tar, then the index, then the record, which commits the shard."""
        write_once(storage, self.record.tar_key, self.tar)
        write_once(storage, self.record.index_key, self.index)
        record = sealed(self.record.model_dump(mode="json"), indent=1, key=RECORD_DIGEST)
        write_once(storage, self.record.record_key, record)


def write_once(storage: Storage, key: str, data: bytes) -> None:
    """Write an object that the job determines; DataError when its key exists with other bytes."""
    if storage.write_new(key, data):
        return
    if (found := hashlib.sha256(storage.read(key)).hexdigest()) != (made := hashlib.sha256(data).hexdigest()):
        raise DataError(
            f"{storage.url}/{key} exists with SHA-256 {found[:12]}, expected {made[:12]}: it was damaged or "
            "written on another kind of machine. Delete it (of a shard: tar, index, record) and start again, "
            "or choose another output"
        )


def build_shard(
    name: str, rows: Iterable[IndexRow], quarantined: Sequence[Quarantined], latent_channels: int
) -> Shard:
    """Build tar, index and record of these rows in order; quarantine rows that are not finite."""
    stream = io.BytesIO()
    records: list[tuple[int, int, int, int, int]] = []
    rejected = list(quarantined)
    sums = np.zeros((2, latent_channels))
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            if not np.isfinite(row.moments).all():
                rejected.append(
                    Quarantined(
                        key=row.key, path=to_utf8(row.path), reason="its latents are not finite in fp16"
                    )
                )
                continue
            npy = encode_sample(row.moments)
            _add(tar, f"{row.key:08d}.cls", str(row.label).encode())
            offset = _add(tar, f"{row.key:08d}.latent.npy", npy)
            records.append((offset, len(npy), row.label, row.key, google_crc32c.value(npy)))
            sums += channel_sums(row.moments)
    data = stream.getvalue()
    index = write_index(np.array(records, RECORD))
    record = ShardRecord(
        name=name,
        samples=len(records),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
        quarantined=tuple(sorted(rejected, key=lambda item: item.key)),
        latent_sum=tuple(sums[0].tolist()),
        latent_square_sum=tuple(sums[1].tolist()),
    )
    return Shard(record, data, index)


def write_shard(
    url: str,
    name: str,
    batches: Sequence[DecodedBatch],
    latent_channels: int,
    *moments: npt.NDArray[np.float16],
) -> ShardRecord:
    """Build and write one shard from its decoded batches and their moments (B, V, 2C, h, w)."""
    rows = (
        IndexRow(entry.key, entry.path, entry.label, latent)
        for batch, latents in zip(batches, moments, strict=True)
        for entry, latent in zip(batch.decoded, latents, strict=True)
    )
    quarantined = [
        Quarantined(key=entry.key, path=to_utf8(entry.path), reason=reason)
        for batch in batches
        for entry, reason in batch.rejected
    ]
    shard = build_shard(name, rows, quarantined, latent_channels)
    shard.write(open_storage(url))
    return shard.record


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member without owner or time; return the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    offset = tar.offset + TAR_HEADER_BYTES
    tar.addfile(member, io.BytesIO(data))
    return offset
