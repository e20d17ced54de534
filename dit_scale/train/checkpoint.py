"""Checkpoints that any world size and any ZeRO stage reads, committed by their manifest.

    checkpoints/<step>-<attempt>/rank-00000.safetensors ...   what each rank owns, fp32, immutable
    checkpoints/<step>-<attempt>/MANIFEST.json                written last: the commit mark

A rank's file holds 1-D extents of parameters, one tensor per kind (master, moments, averages), with a
CRC-32C per block. A reader trusts manifests only, newest first; it reads the byte ranges that it
needs, checks their blocks, and falls back to the one before when anything does not fit.
docs/formats.md describes the files.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import safetensors.numpy
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from dit_scale.config import TrainConfig
from dit_scale.errors import CheckpointError, StorageError
from dit_scale.storage import MissingKeyError, Storage
from dit_scale.train.engine import Extent, Partition

FORMAT = "dit-scale checkpoint"
FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
BLOCK_BYTES = 4 * 2**20
"""Bytes of a tensor under one checksum; a multiple of 4."""

_NAME = re.compile(r"\d{10}-\d{4}")
_SEAL = b',"sha256":"'

ReadExtent = Callable[[str, str, int, int], Tensor]
"""(kind, parameter, start, length) => fp32 tensor of `length` elements."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class TensorRecord(_Record):
    """One extent of one parameter and kind in a rank's file."""

    kind: str
    parameter: str
    start: int
    """First element within the flattened parameter."""
    length: int
    offset: int
    """First byte within the file."""
    crc32c: tuple[int, ...]
    """Of every block of `BLOCK_BYTES`, the last one shorter."""


class FileRecord(_Record):
    """One rank's file."""

    key: str
    bytes: int
    tensors: tuple[TensorRecord, ...]


class Manifest(_Record):
    """MANIFEST.json: what the checkpoint is, and where each part of it lies."""

    format: str = FORMAT
    version: int = FORMAT_VERSION
    step: int
    """Optimizer steps taken."""
    samples: int
    """Position in the data: step * global batch."""
    attempt: int
    config: dict[str, Any]
    """The resolved configuration of the run that wrote this."""
    data_sha256: str
    """Of the latent data set's dataset.json."""
    vae_sha256: str
    """Of the weights of the autoencoder that made the latents."""
    model_shapes: dict[str, tuple[int, ...]]
    """Full shape of every trainable parameter."""
    optimizer_groups: tuple[dict[str, Any], ...]
    pending_metrics: tuple[tuple[float, ...], ...]
    """Loss rows of the steps since the last log point, so that the log goes on unbroken."""
    versions: dict[str, str]
    written_by: dict[str, int]
    """World size and ZeRO stage of the writer; of interest to people only."""
    files: tuple[FileRecord, ...]


def name_of(step: int, attempt: int) -> str:
    """The folder of a checkpoint; names sort by step, then attempt."""
    return f"{step:010d}-{attempt:04d}"


def write_rank_file(storage: Storage, name: str, rank: int, owned: Iterable[Partition]) -> FileRecord:
    """Write what this rank owns, and describe it for the manifest."""
    key = f"{name}/rank-{rank:05d}.safetensors"
    arrays: dict[str, np.ndarray] = {}
    extents: dict[str, tuple[str, Extent]] = {}
    for partition in owned:
        for kind, buffer in partition.buffers.items():
            host = buffer.detach().cpu().numpy()
            for extent in partition.extents:
                tensor_name = f"{kind}/{extent.parameter}@{extent.start}"
                arrays[tensor_name] = host[extent.offset : extent.offset + extent.length]
                extents[tensor_name] = (kind, extent)
    data = safetensors.numpy.save(arrays)
    storage.write(key, data)
    records = [
        TensorRecord(
            kind=extents[tensor_name][0],
            parameter=extents[tensor_name][1].parameter,
            start=extents[tensor_name][1].start,
            length=extents[tensor_name][1].length,
            offset=begin,
            crc32c=_block_crcs(memoryview(data)[begin:end]),
        )
        for tensor_name, (begin, end) in _tensor_ranges(data).items()
    ]
    return FileRecord(key=key, bytes=len(data), tensors=tuple(records))


def commit(storage: Storage, manifest: Manifest) -> None:
    """Put the manifest, once: from here on the checkpoint exists."""
    key = f"{name_of(manifest.step, manifest.attempt)}/{MANIFEST}"
    body = json.dumps(manifest.model_dump(mode="json"), separators=(",", ":")).encode()[:-1]
    if not storage.write_new(key, body + _seal(body)):
        raise CheckpointError(f"{storage.url}/{key} is there already: another process writes to this run")


class Checkpoint:
    """A committed checkpoint. Raises CheckpointError, naming object and tensor, for whatever does not fit."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        where = f"{storage.url}/{name}/{MANIFEST}"
        try:
            data = storage.read(f"{name}/{MANIFEST}")
            body = data.rpartition(_SEAL)[0]
            if body + _seal(body) != data:
                raise CheckpointError(f"{where} is damaged (its SHA-256 does not fit)")
            self.manifest = Manifest.model_validate_json(data)
        except (ValidationError, StorageError) as error:
            raise CheckpointError(f"{where} cannot be read: {error}") from None
        if (self.manifest.format, self.manifest.version) != (FORMAT, FORMAT_VERSION):
            raise CheckpointError(
                f"{where}: version {self.manifest.version}, this program reads {FORMAT_VERSION}"
            )
        for file in self.manifest.files:
            self._check_size(file)

    def __str__(self) -> str:
        return f"{self.storage.url}/{self.name}"

    @property
    def bytes(self) -> int:
        """Of all files beside the manifest."""
        return sum(file.bytes for file in self.manifest.files)

    @cached_property
    def config(self) -> TrainConfig:
        """The configuration of the run that wrote it."""
        try:
            return TrainConfig.model_validate(self.manifest.config)
        except ValidationError as error:
            raise CheckpointError(f"{self} is of another version of this program: {error}") from None

    @cached_property
    def _tensors(self) -> dict[tuple[str, str], list[tuple[FileRecord, TensorRecord]]]:
        table: dict[tuple[str, str], list[tuple[FileRecord, TensorRecord]]] = {}
        for file in self.manifest.files:
            for tensor in file.tensors:
                table.setdefault((tensor.kind, tensor.parameter), []).append((file, tensor))
        return table

    def kinds(self) -> set[str]:
        """The kinds of state that it holds."""
        return {kind for kind, _ in self._tensors}

    def read(self, kind: str, parameter: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of a flattened parameter, fp32, every block checked."""
        out = np.empty(length, dtype="<f4")
        filled = 0
        for file, tensor in self._tensors.get((kind, parameter), ()):
            low, high = max(start, tensor.start), min(start + length, tensor.start + tensor.length)
            if low < high:
                out[low - start : high - start] = self._read_piece(
                    file, tensor, low - tensor.start, high - low
                )
                filled += high - low
        if filled != length:
            raise CheckpointError(f"{self}: {kind} of {parameter} has {filled} of {length} elements")
        return torch.from_numpy(out)

    def read_whole(self, kind: str) -> dict[str, Tensor]:
        """Every parameter of a kind in its full shape, by name."""
        shapes = self.manifest.model_shapes
        return {
            name: self.read(kind, name, 0, int(np.prod(shape, dtype=np.int64))).reshape(shape)
            for name, shape in shapes.items()
        }

    def _read_piece(self, file: FileRecord, tensor: TensorRecord, start: int, length: int) -> np.ndarray:
        first, last = 4 * start // BLOCK_BYTES, (4 * (start + length) - 1) // BLOCK_BYTES
        begin, end = first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, 4 * tensor.length)
        try:
            data = self.storage.read_range(file.key, tensor.offset + begin, end - begin)
        except StorageError as error:
            raise CheckpointError(str(error)) from None
        if _block_crcs(memoryview(data)) != tensor.crc32c[first : last + 1]:
            raise CheckpointError(
                f"{self.storage.url}/{file.key}: {tensor.kind} of {tensor.parameter} is damaged "
                f"(CRC-32C of elements {tensor.start + begin // 4} to {tensor.start + end // 4})"
            )
        skip = start - begin // 4
        return np.frombuffer(data, dtype="<f4")[skip : skip + length]

    def _check_size(self, file: FileRecord) -> None:
        try:
            size = self.storage.size(file.key)
        except MissingKeyError:
            raise CheckpointError(f"{self.storage.url}/{file.key} is missing") from None
        if size != file.bytes:
            raise CheckpointError(f"{self.storage.url}/{file.key}: expected {file.bytes} bytes, got {size}")


def committed(storage: Storage) -> list[str]:
    """Names of the checkpoints that have a manifest, newest first."""
    names = (key.removesuffix(f"/{MANIFEST}") for key, _ in storage.list() if key.endswith(f"/{MANIFEST}"))
    return sorted(filter(_NAME.fullmatch, names), reverse=True)


def fill(owned: Iterable[Partition], kinds: Iterable[str], read: ReadExtent) -> None:
    """Copy these kinds of state into the flat buffers that this rank owns."""
    wanted = tuple(kinds)
    for partition in owned:
        for kind in wanted:
            buffer = partition.buffers[kind].detach()
            for extent in partition.extents:
                values = read(kind, extent.parameter, extent.start, extent.length)
                buffer[extent.offset : extent.offset + extent.length].copy_(values)


def prune(storage: Storage, newest: str, keep: int, keep_every_steps: int) -> list[str]:
    """Delete what retention does not keep, manifest first, and name it.

    It counts down from `newest`, which is opened again before anything goes. What sorts above it does
    not count: the run has passed over it as damaged. Folders below it without a manifest are what kills
    left behind in the middle of a save or a prune; they go too.
    """
    Checkpoint(storage, newest)
    below = [name for name in committed(storage) if name < newest]
    spare = below[keep - 1 :]
    old = [name for name in spare if not (keep_every_steps and _step(name) % keep_every_steps == 0)]
    folders = {key.split("/")[0] for key, _ in storage.list()} - set(below)
    abandoned = [name for name in folders if _NAME.fullmatch(name) and name < newest]
    for name in (*old, *abandoned):
        storage.delete(f"{name}/{MANIFEST}")
        for key, _ in storage.list(f"{name}/"):
            storage.delete(key)
    return old


def _step(name: str) -> int:
    return int(name.split("-")[0])


def _seal(body: bytes) -> bytes:
    """The end of a manifest: its last key, with the digest of all bytes before it."""
    return _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}'


def _block_crcs(data: memoryview) -> tuple[int, ...]:
    return tuple(
        google_crc32c.value(bytes(data[start : start + BLOCK_BYTES]))
        for start in range(0, len(data), BLOCK_BYTES)
    )


def _tensor_ranges(data: bytes) -> dict[str, tuple[int, int]]:
    """Byte range of every tensor in a safetensors file, from its header."""
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    body = 8 + header_bytes
    return {
        name: (body + entry["data_offsets"][0], body + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }
