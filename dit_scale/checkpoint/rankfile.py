"""One rank's file of a checkpoint: a safetensors file that carries the checksums of its own blocks. No torch.

    <8 bytes: length of the header> <header: JSON> <tensors, one behind the other>

A tensor is a run of elements of one flattened parameter: fp32, 1-D, named `<kind>/<parameter>@<start>`.
The header's `__metadata__` has the CRC-32C of every block of every tensor; the manifest has the
SHA-256 of the header. So every byte of the file is covered, and any range can be read and checked alone.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dit_scale.checkpoint.manifest import FileRecord
from dit_scale.errors import CheckpointError, StorageError
from dit_scale.storage import Storage, UnavailableError

BLOCK_BYTES = 4 * 2**20
"""Bytes of a tensor under one checksum; a multiple of 4."""
RUN_BYTES = 4 * BLOCK_BYTES
"""Bytes that `verify` asks for at once: tensors may be small and many, and every request takes its time."""
READS = 4
"""Times that bytes are asked for whose checksum is wrong: those of a range may change on their way."""
_LENGTH_BYTES = 8

Bytes = NDArray[np.uint8]
Fault = TypeVar("Fault", bool, list[int])


@dataclass(frozen=True)
class Piece:
    """One tensor of a rank's file."""

    kind: str
    parameter: str
    start: int
    """First element within the flattened parameter."""
    length: int
    """Elements."""

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.parameter}@{self.start}"

    @property
    def bytes(self) -> int:
        return 4 * self.length


@dataclass(frozen=True)
class StoredPiece(Piece):
    """Where it lies, and what its blocks add up to."""

    offset: int
    """First byte within the file."""
    crc32c: tuple[int, ...]
    """Of every block of `BLOCK_BYTES`, the last one shorter."""


@dataclass(frozen=True)
class _Block:
    """The run of bytes of a piece that has a checksum."""

    piece: StoredPiece
    start: int
    """First element within the piece."""
    length: int
    """Elements."""
    crc32c: int

    @property
    def offset(self) -> int:
        """First byte within the file."""
        return self.piece.offset + 4 * self.start


def name_of_rank(rank: int) -> str:
    """The file that a rank writes, below the checkpoint's folder."""
    return f"rank-{rank:05d}.safetensors"


def write(storage: Storage, key: str, pieces: Sequence[tuple[Piece, Bytes]]) -> FileRecord:
    """Put these pieces as one file. Nothing is copied: the data may be shared memory."""
    header = _header(pieces)
    record = _record(key, header, pieces)
    chunks = (block.data for _, data in pieces for block in blocks(data))
    storage.write_stream(key, _chain(memoryview(header), chunks), record.bytes)
    return record


def record_of(key: str, pieces: Sequence[tuple[Piece, Bytes]]) -> FileRecord:
    """What `write` returns: it covers every byte of the file."""
    return _record(key, _header(pieces), pieces)


def open_file(storage: Storage, folder: str, file: FileRecord) -> tuple[StoredPiece, ...]:
    """The pieces of a file, its size and header checked. Raises CheckpointError that names the file."""
    key = f"{folder}/{file.key}"
    where = f"{storage.url}/{key}"
    with _damage_told():
        size = storage.size(key)
        if size != file.bytes:
            raise CheckpointError(f"{where}: expected {file.bytes} bytes, got {size}")
        header, damaged = _read_again_if(
            lambda data: hashlib.sha256(data).hexdigest() != file.header_sha256,
            lambda: storage.read_range(key, 0, file.header_bytes),
        )
    if damaged:
        raise CheckpointError(f"{where}: its header is damaged (SHA-256)")
    return tuple(_pieces(header))


def read(storage: Storage, key: str, piece: StoredPiece, start: int, length: int) -> NDArray[np.float32]:
    """Elements [start, start + length) of a piece, every block around them checked."""
    first, last = 4 * start // BLOCK_BYTES, (4 * (start + length) - 1) // BLOCK_BYTES
    begin, end = first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, piece.bytes)
    crcs = piece.crc32c[first : last + 1]
    with _damage_told(f"{piece.kind} of {piece.parameter}: "):
        data, bad = _read_again_if(
            lambda data: _bad_blocks(data, crcs),
            lambda: storage.read_range(key, piece.offset + begin, end - begin),
        )
    for number in bad:
        low = piece.start + (first + number) * BLOCK_BYTES // 4
        raise CheckpointError(
            f"{storage.url}/{key}: {piece.kind} of {piece.parameter} is damaged "
            f"(CRC-32C of elements {low} to {min(low + BLOCK_BYTES // 4, piece.start + piece.length)})"
        )
    skip = start - begin // 4
    return np.frombuffer(data, "<f4")[skip : skip + length]


def verify(storage: Storage, folder: str, file: FileRecord) -> None:
    """Read every byte of a file. Raises CheckpointError that names the file, and the tensor if it is one."""
    key = f"{folder}/{file.key}"
    for run in _runs(open_file(storage, folder, file)):
        begin = run[0].offset
        with _damage_told():
            data = storage.read_range(key, begin, 4 * sum(block.length for block in run))
        for block in run:
            low = block.offset - begin
            found = np.frombuffer(data, np.uint8, 4 * block.length, low)
            if google_crc32c.value(found) != block.crc32c:
                read(storage, key, block.piece, block.start, block.length)  # alone: it may come whole now


def blocks(data: Bytes) -> Iterator[Bytes]:
    """The runs of bytes that have a checksum each."""
    return (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))


def _runs(pieces: Iterable[StoredPiece]) -> Iterator[list[_Block]]:
    """The blocks of pieces that lie one behind the other, as many together as fit into RUN_BYTES."""
    run: list[_Block] = []
    elements = BLOCK_BYTES // 4
    for piece in pieces:
        for number, crc in enumerate(piece.crc32c):
            start = number * elements
            block = _Block(piece, start, min(elements, piece.length - start), crc)
            if run and block.offset + 4 * block.length - run[0].offset > RUN_BYTES:
                yield run
                run = []
            run.append(block)
    if run:
        yield run


@contextmanager
def _damage_told(what: str = "") -> Iterator[None]:
    """A file that is not there, or short, is a damaged checkpoint; a storage without an answer is not."""
    try:
        yield
    except UnavailableError:
        raise
    except StorageError as error:
        raise CheckpointError(f"{what}{error}") from None


def _read_again_if(fault_of: Callable[[bytes], Fault], get: Callable[[], bytes]) -> tuple[bytes, Fault]:
    """What a storage holds, and its fault; asked for up to READS times while there is one."""
    for _ in range(READS):
        data = get()
        fault = fault_of(data)
        if not fault:
            break
    return data, fault


def _bad_blocks(data: bytes, crcs: Sequence[int]) -> list[int]:
    """Which blocks do not have their checksum."""
    found = enumerate(zip(blocks(np.frombuffer(data, np.uint8)), crcs, strict=True))
    return [number for number, (block, crc) in found if google_crc32c.value(block) != crc]


def _header(pieces: Sequence[tuple[Piece, Bytes]]) -> bytes:
    tree: dict[str, object] = {}
    checksums, offset = {}, 0
    for piece, data in pieces:
        end = offset + piece.bytes
        tree[piece.name] = {"dtype": "F32", "shape": [piece.length], "data_offsets": [offset, end]}
        checksums[piece.name] = [google_crc32c.value(block) for block in blocks(data)]
        offset = end
    metadata = {"crc32c": json.dumps(checksums, separators=(",", ":"))}
    body = json.dumps({"__metadata__": metadata, **tree}, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def _record(key: str, header: bytes, pieces: Sequence[tuple[Piece, Bytes]]) -> FileRecord:
    return FileRecord(
        key=key.rpartition("/")[2],
        bytes=len(header) + sum(piece.bytes for piece, _ in pieces),
        header_bytes=len(header),
        header_sha256=hashlib.sha256(header).hexdigest(),
    )


def _pieces(header: bytes) -> Iterator[StoredPiece]:
    tree = json.loads(header[_LENGTH_BYTES:])
    checksums = json.loads(tree.pop("__metadata__")["crc32c"])
    for name, entry in tree.items():
        kind, _, place = name.partition("/")
        parameter, _, start = place.rpartition("@")
        begin, end = entry["data_offsets"]
        crcs = tuple(checksums[name])
        yield StoredPiece(kind, parameter, int(start), (end - begin) // 4, len(header) + begin, crcs)


def _chain(first: memoryview, rest: Iterable[memoryview]) -> Iterator[memoryview]:
    yield first
    yield from rest
