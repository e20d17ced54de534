"""The latent data set on disk or S3: its format, and random access to its samples.

    <url>/dataset.json       written last, which commits the data set: read by `read_info`
    <url>/shards/00000.tar   WebDataset: <key>.cls (decimal label), <key>.latent.npy (views, 2C, h, w)
    <url>/shards/00000.idx   a 24-byte header, then one 24-byte record per sample

A sample id counts the samples of all shards in order, without gaps: id = samples in earlier shards +
row in its shard. A sample's array is fp16, image then mirrored image, posterior mean then standard
deviation, unscaled. Everything is verified when it is read: a flipped bit is an error, never data.
"""

import functools
import hashlib
import io
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from dit_scale.data.cache import RETRY_PAUSES_S, ShardCache, ShardFile
from dit_scale.data.files import DamagedError, SampleLocation, ShardFiles, concurrently
from dit_scale.errors import DataError
from dit_scale.sealed import unseal_any
from dit_scale.storage import MissingKeyError, Storage, open_storage

FORMAT = "dit-scale latents"
FORMAT_VERSION = 1
INFO_KEY, IDENTITY_KEY = "dataset.json", "encode.json"
MEND_INFO = "Copy it again from its origin; if you edited it on purpose, delete its last key, sha256"

RECORD_DIGEST = "record_sha256"
"""The key that seals a shard's record, where `sha256` is the digest of the tar."""

INDEX_MAGIC = b"DITSIDX\n"
INDEX_VERSION = 1
INDEX_HEADER = struct.Struct("<8sIIII")
"""Magic, version, number of records, CRC-32C of the records, zero."""
RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<u4"), ("key", "<u4"), ("crc32c", "<u4")])
"""Position of a sample's npy in the tar, its class, its index in the source listing, its checksum."""

LATENT_DTYPE = np.dtype("<f2")

Records = npt.NDArray[np.void]
Latents = npt.NDArray[np.float16]
I64 = npt.NDArray[np.int64]


class _Part(BaseModel):
    # Later versions may add keys; the keys that this version needs must exist with the right type.
    model_config = ConfigDict(frozen=True, extra="ignore")


class VaeIdentity(_Part):
    """The autoencoder that made the latents; `scale` multiplies them before they enter the model."""

    name: str
    weights_sha256: str
    scale: float
    downsample: int
    latent_channels: int


class SourceInfo(_Part):
    """The source of the images; `listing_sha256` covers their sorted relative paths."""

    kind: str
    uri: str
    count: int
    listing_sha256: str


class Quarantined(_Part):
    """An input that could not be encoded: its index in the listing, its path, and the reason."""

    key: int
    path: str
    reason: str


class ShardInfo(_Part):
    """One shard; sizes and digests cover entire files."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def tar_key(self) -> str:
        return f"shards/{self.name}.tar"

    @property
    def index_key(self) -> str:
        return f"shards/{self.name}.idx"

    @property
    def record_key(self) -> str:
        """Key of the record that commits the shard while the data set is encoded."""
        return f"shards/{self.name}.json"


class DatasetInfo(_Part):
    """dataset.json, typed."""

    format: str
    version: int
    image_size: int
    latent_shape: tuple[int, int, int, int]
    """Shape (views, 2C, h, w) of a sample."""
    latent_dtype: str
    views: tuple[str, ...]
    vae: VaeIdentity
    crop: str
    encoding: dict[str, Any]
    """Everything else that the bytes depend on: VAE batch, precision, device, threads, versions."""
    source: SourceInfo
    class_names: tuple[str, ...]
    samples: int
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    """Statistics per latent channel of unscaled posterior samples mean + std * n over both views."""
    shards: tuple[ShardInfo, ...]
    quarantined: tuple[Quarantined, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are smaller."""
        return len(self.class_names)


def read_info(storage: Storage, say: Callable[[str], object] = lambda note: None) -> DatasetInfo:
    """Read dataset.json of a finished data set; DataError explains what is wrong otherwise.

    Reports to `say` if it has no digest of itself, as in earlier versions.
    """
    where = f"{storage.url}/{INFO_KEY}"
    try:
        data = storage.read(INFO_KEY)
    except MissingKeyError:
        is_unfinished = storage.exists(IDENTITY_KEY)
        raise DataError(
            f"{storage.url} has no {INFO_KEY}: "
            + (
                "its encoding has not finished; run the same encoding command again"
                if is_unfinished
                else "not a latent data set; make one with `dit-scale encode`"
            )
        ) from None
    try:
        tree, has_digest = unseal_any(data, where, DataError)
    except DataError as error:
        raise DataError(f"{error}. {MEND_INFO}") from None
    if tree.get("format") != FORMAT:
        raise DataError(f"{where}: expected format {FORMAT!r}, got {tree.get('format')!r}")
    if tree.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{where} has format version {tree.get('version')}, this program reads {FORMAT_VERSION}; "
            "use the version of the program that wrote it, or encode again"
        )
    try:
        info = DatasetInfo.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if info.samples != sum(shard.samples for shard in info.shards):
        raise DataError(f"{where}: the shards do not add up to {info.samples} samples")
    if not has_digest:
        say(f"{where} has no digest, because an earlier version wrote it: damage to it cannot be detected")
    return info


def write_index(records: Records) -> bytes:
    """Return the .idx file of a shard's records."""
    body = np.ascontiguousarray(records, RECORD).tobytes()
    header = INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, len(records), google_crc32c.value(body), 0)
    return header + body


def read_index(data: bytes, where: str = "index") -> Records:
    """Return the verified records of an .idx file; `where` names it in errors."""
    if len(data) < INDEX_HEADER.size or not data.startswith(INDEX_MAGIC):
        raise DataError(f"{where}: expected the magic {INDEX_MAGIC!r}, got {data[:8]!r}")
    _, version, count, crc, _ = INDEX_HEADER.unpack_from(data)
    if version != INDEX_VERSION:
        raise DataError(f"{where} has index version {version}, this program reads {INDEX_VERSION}")
    body = data[INDEX_HEADER.size :]
    if len(body) != count * RECORD.itemsize:
        raise DataError(
            f"{where}: expected {count} records, got {len(body) / RECORD.itemsize:.2f}; it may be truncated"
        )
    if google_crc32c.value(body) != crc:
        raise DataError(f"{where}: its checksum is wrong; the index is damaged, fetch or make it again")
    return np.frombuffer(body, RECORD)


def encode_sample(moments: npt.NDArray[np.float16]) -> bytes:
    """Return the npy file of one sample: (views, 2C, h, w) => little-endian fp16, C order."""
    stream = io.BytesIO()
    np.lib.format.write_array(
        stream, np.ascontiguousarray(moments, LATENT_DTYPE), version=(1, 0), allow_pickle=False
    )
    return stream.getvalue()


def decode_sample(npy: bytes, crc32c: int, where: str = "sample") -> npt.NDArray[np.float16]:
    """Verify an npy file and return its array, a view into `npy`; `where` names the sample in errors."""
    got = google_crc32c.value(npy)
    if got != crc32c:
        raise DataError(
            f"{where}: expected CRC-32C {crc32c:08x}, got {got:08x}; "
            "the shard is damaged, fetch or encode it again"
        )
    body = 10 + int.from_bytes(npy[8:10], "little")
    try:
        shape = _npy_shape(npy[:body])
        return np.frombuffer(npy, LATENT_DTYPE, offset=body).reshape(shape)
    except ValueError as error:
        raise DataError(f"{where}: not an npy file of fp16 latents ({error})") from None


@functools.lru_cache(maxsize=16)
def _npy_shape(header: bytes) -> tuple[int, ...]:
    """Return the shape in an npy header, cached: all samples of a data set have the same header."""
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("expected npy version 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran_order or dtype != LATENT_DTYPE:
        raise ValueError(f"expected {LATENT_DTYPE.str} in C order, got {dtype.str}")
    return shape


@dataclass(frozen=True)
class Location:
    """Location of a sample: number of the shard, row in the shard."""

    shard: int
    row: int


class LatentDataset:
    """Random access to a finished data set. Threads and forked processes may share it."""

    def __init__(self, storage: Storage, cache_dir: str | Path, cache_bytes: int = 0) -> None:
        self.storage = storage
        self.notes: list[str] = []
        """Messages about the data set for the user."""
        self.info = info = read_info(storage, self.notes.append)
        self.cache = ShardCache(storage, cache_dir, cache_bytes)
        tars = [ShardFile(shard.name, shard.tar_key, shard.bytes, shard.sha256) for shard in info.shards]
        self.files = ShardFiles(storage, self.cache, tars)
        self._ends = np.cumsum([shard.samples for shard in info.shards], dtype=np.int64)
        self._table = np.empty(info.samples, RECORD)
        self._has_index = np.zeros(len(info.shards), dtype=bool)
        self._header = encode_sample(np.zeros(info.latent_shape, LATENT_DTYPE))
        self._header = self._header[: -int(np.prod(info.latent_shape)) * LATENT_DTYPE.itemsize]

    @classmethod
    def open(
        cls, url: str | Path, cache_dir: str | Path = "~/.cache/dit_scale/shards", cache_bytes: int = 0
    ) -> "LatentDataset":
        """Open the data set at a folder or s3:// prefix.

        `cache_dir` holds shards of a remote data set, at most `cache_bytes` (0: no limit).
        """
        return cls(open_storage(url), cache_dir, cache_bytes)

    def __len__(self) -> int:
        return self.info.samples

    def records(self, shard: int) -> Records:
        """Return the index of a shard, verified against dataset.json."""
        self._read_indexes(np.array([shard]))
        end = int(self._ends[shard])
        return self._table[end - self.info.shards[shard].samples : end]

    def labels(self) -> npt.NDArray[np.uint32]:
        """Return the class of every sample, by sample id. Reads all indexes."""
        self._read_indexes(np.arange(len(self.info.shards)))
        return self._table["label"].copy()

    def locate(self, sample_id: int) -> Location:
        """Return the shard and row of a sample id in 0..N-1."""
        if not 0 <= sample_id < len(self):
            raise DataError(f"sample {sample_id}: this data set has samples 0 to {len(self) - 1}")
        shard = int(np.searchsorted(self._ends, sample_id, side="right"))
        return Location(shard, sample_id - int(self._ends[shard]) + self.info.shards[shard].samples)

    def read(self, sample_id: int) -> tuple[npt.NDArray[np.float16], int]:
        """Read the moments (views, 2C, h, w), read-only and unscaled, and the label of a sample.

        Raises DamagedError if its checksum is wrong in every read, DataError, StorageError.
        """
        shard = self.locate(sample_id).shard
        self._read_indexes(np.array([shard]))
        offset, length, label, _, crc32c = self._table[sample_id].tolist()
        where = f"{self.storage.url}: {self._name(sample_id)}"
        with self.files.waits_for(sample_id):
            npy = self.files.read(shard, offset, length, crc32c, where)
        moments = decode_sample(npy, crc32c, where)
        if moments.shape != self.info.latent_shape:
            raise DataError(f"{where}: expected shape {self.info.latent_shape}, got {moments.shape}")
        return moments, label

    def read_views(self, ids_B: I64, views_B: I64, out_B2CHW: Latents) -> tuple[I64, dict[int, str]]:
        """Read one view of each sample into `out`. Returns the labels, and damaged sample ids => reason."""
        shards_B = np.searchsorted(self._ends, ids_B, side="right")
        self._read_indexes(shards_B)
        records_B = self._table[ids_B]
        columns = (ids_B, shards_B, records_B["offset"], records_B["length"], records_B["crc32c"], views_B)
        samples = map(SampleLocation._make, zip(*(column.tolist() for column in columns), strict=True))
        unread = self.files.read_views(samples, self._header, self.info.latent_shape[0], out_B2CHW)
        damaged: dict[int, str] = {}

        def read_one(row: int) -> None:
            try:
                out_B2CHW[row] = self.read(int(ids_B[row]))[0][views_B[row]]
            except DamagedError as error:
                damaged[int(ids_B[row])] = str(error)

        concurrently(read_one, unread)
        return records_B["label"].astype(np.int64), damaged

    def waits_for(self) -> str:
        """Describe the read that has been running longest, and for how long; empty if there is none."""
        waiting = self.files.waiting.copy()
        if not waiting:
            return ""
        what = min(waiting, key=lambda what: waiting[what])
        name = what if isinstance(what, str) else self._name(what)
        return f"{name} for {time.monotonic() - waiting[what]:.1f} s"

    def _name(self, sample_id: int) -> str:
        return f"shard {self.info.shards[self.locate(sample_id).shard].name}, sample {sample_id}"

    def _read_indexes(self, shards: npt.NDArray[np.int64]) -> None:
        """Load the records of these shards into the table."""
        if self._has_index[shards].all():
            return
        concurrently(self._read_index, np.unique(shards[~self._has_index[shards]]).tolist())

    def _read_index(self, shard: int) -> None:
        info = self.info.shards[shard]
        where = f"{self.storage.url}/{info.index_key}"
        with self.files.waits_for(where):
            for pause_s in RETRY_PAUSES_S:
                time.sleep(pause_s)
                data = self.storage.read(info.index_key)
                if hashlib.sha256(data).hexdigest() == info.index_sha256:
                    break
            else:
                raise DataError(
                    f"{where}: its SHA-256 is not the one in {INFO_KEY}; damaged, or from another encoding"
                )
        records = read_index(data, where)
        if len(records) != info.samples:
            raise DataError(f"{where}: expected {info.samples} records, got {len(records)}")
        self._table[self._ends[shard] - info.samples : self._ends[shard]] = records
        self._has_index[shard] = True
