"""One rank's file of a checkpoint: safetensors with a checksum for every block. No torch.

    <8 bytes: length of the header> <header: JSON> <tensors, back to back>

A tensor is a slice of one flattened parameter: fp32, 1-D, named `<kind>/<parameter>@<start>`.
The header's `__metadata__` has the CRC-32C of every block of every tensor; the manifest has the SHA-256 of
the header. So every byte of the file is covered, and any range can be read and verified on its own.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dit_scale.checkpoint.manifest import FileRecord
from dit_scale.checkpoint.slices import ParameterSlice, StateSlices, StoredSlice
from dit_scale.errors import CheckpointError, StorageError
from dit_scale.storage import Storage, UnavailableError

BLOCK_BYTES = 4 * 2**20
"""Bytes of a tensor under one checksum; a multiple of 4."""
RUN_BYTES = 4 * BLOCK_BYTES
"""Bytes that `verify` reads per request: a file may have many small tensors, and each request has latency."""
READS = 4
"""Reads before a wrong checksum counts as damage: bytes of a range may be corrupted in transit."""
_LENGTH_BYTES = 8

Bytes = NDArray[np.uint8]
Fault = TypeVar("Fault", bool, list[int])


def file_name(rank: int) -> str:
    """Name of a rank's file in the checkpoint's folder."""
    return f"rank-{rank:05d}.safetensors"


def write(storage: Storage, key: str, memory: Bytes, slices: StateSlices) -> FileRecord:
    """Write these slices of a flat memory as one file, without copying them."""
    header = _header(memory, slices)
    record = _record(key, header, slices)
    chunks = (block.data for _, slice_ in slices for block in _blocks(_data(memory, slice_)))
    storage.write_stream(key, _chain(memoryview(header), chunks), record.bytes)
    return record


def record_of(key: str, memory: Bytes, slices: StateSlices) -> FileRecord:
    """Return the record that `write` would return; it covers every byte of the file."""
    return _record(key, _header(memory, slices), slices)


def open_file(storage: Storage, path: str, file: FileRecord) -> tuple[StoredSlice, ...]:
    """Return the slices of a file in the checkpoint at `path`, after checking the file's size and header.

    Raises CheckpointError that names the file.
    """
    key = f"{path}/{file.key}"
    where = f"{storage.url}/{key}"
    with _missing_is_damage():
        size = storage.size(key)
        if size != file.bytes:
            raise CheckpointError(f"{where}: expected {file.bytes} bytes, got {size}")
        header, damaged = _read_until_sound(
            lambda data: hashlib.sha256(data).hexdigest() != file.header_sha256,
            lambda: storage.read_range(key, 0, file.header_bytes),
        )
    if damaged:
        raise CheckpointError(f"{where}: its header is damaged (SHA-256)")
    return tuple(_stored_slices(header))


def read(storage: Storage, key: str, stored: StoredSlice, start: int, length: int) -> NDArray[np.float32]:
    """Read elements [start, start + length) of a slice, verifying every block that they touch."""
    first, last = 4 * start // BLOCK_BYTES, (4 * (start + length) - 1) // BLOCK_BYTES
    low, high = first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, stored.bytes)
    crcs = stored.crc32c[first : last + 1]
    with _missing_is_damage(f"{stored.kind} of {stored.parameter}: "):
        data, bad = _read_until_sound(
            lambda data: _bad_blocks(data, crcs),
            lambda: storage.read_range(key, stored.byte_offset + low, high - low),
        )
    for number in bad:
        element = stored.start + (first + number) * BLOCK_BYTES // 4
        end = min(element + BLOCK_BYTES // 4, stored.start + stored.length)
        raise CheckpointError(
            f"{storage.url}/{key}: {stored.kind} of {stored.parameter} is damaged "
            f"(CRC-32C of elements {element} to {end})"
        )
    skip = start - low // 4
    return np.frombuffer(data, "<f4")[skip : skip + length]


def verify(storage: Storage, path: str, file: FileRecord) -> None:
    """Read every byte of a file. Raises CheckpointError that names the file, and the damaged tensor."""
    key = f"{path}/{file.key}"
    for run in _runs(open_file(storage, path, file)):
        first = run[0].byte_offset
        with _missing_is_damage():
            data = storage.read_range(key, first, sum(block.bytes for block in run))
        for block in run:
            found = np.frombuffer(data, np.uint8, block.bytes, block.byte_offset - first)
            if google_crc32c.value(found) != block.crc32c[0]:
                read(storage, key, block, 0, block.length)  # raises unless the block is sound when read alone


def _blocks(data: Bytes) -> Iterator[Bytes]:
    """Split bytes into the blocks that have one checksum each."""
    return (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))


def _stored_blocks(slices: Iterable[StoredSlice]) -> Iterator[StoredSlice]:
    """Split slices into slices of one block each."""
    elements = BLOCK_BYTES // 4
    for stored in slices:
        for number, crc in enumerate(stored.crc32c):
            skip = number * elements
            yield StoredSlice(
                kind=stored.kind,
                parameter=stored.parameter,
                start=stored.start + skip,
                length=min(elements, stored.length - skip),
                byte_offset=stored.byte_offset + 4 * skip,
                crc32c=(crc,),
            )


def _runs(slices: Iterable[StoredSlice]) -> Iterator[list[StoredSlice]]:
    """Group the blocks of adjacent slices, as many together as fit into RUN_BYTES."""
    run: list[StoredSlice] = []
    for block in _stored_blocks(slices):
        if run and block.byte_offset + block.bytes - run[0].byte_offset > RUN_BYTES:
            yield run
            run = []
        run.append(block)
    if run:
        yield run


@contextmanager
def _missing_is_damage(what: str = "") -> Iterator[None]:
    """Turn a missing or short file into CheckpointError; a storage that does not answer proves no damage."""
    try:
        yield
    except UnavailableError:
        raise
    except StorageError as error:
        raise CheckpointError(f"{what}{error}") from None


def _read_until_sound(fault_of: Callable[[bytes], Fault], get: Callable[[], bytes]) -> tuple[bytes, Fault]:
    """Read up to READS times until there is no fault. Returns the last bytes and their fault."""
    for _ in range(READS):
        data = get()
        fault = fault_of(data)
        if not fault:
            break
    return data, fault


def _bad_blocks(data: bytes, crcs: Sequence[int]) -> list[int]:
    """Return the numbers of the blocks whose checksum is wrong."""
    found = enumerate(zip(_blocks(np.frombuffer(data, np.uint8)), crcs, strict=True))
    return [number for number, (block, crc) in found if google_crc32c.value(block) != crc]


def _data(memory: Bytes, slice_: ParameterSlice) -> Bytes:
    return memory[4 * slice_.offset : 4 * (slice_.offset + slice_.length)]


def _header(memory: Bytes, slices: StateSlices) -> bytes:
    tree: dict[str, object] = {}
    checksums, offset = {}, 0
    for kind, slice_ in slices:
        name, end = f"{kind}/{slice_.parameter}@{slice_.start}", offset + 4 * slice_.length
        tree[name] = {"dtype": "F32", "shape": [slice_.length], "data_offsets": [offset, end]}
        checksums[name] = [google_crc32c.value(block) for block in _blocks(_data(memory, slice_))]
        offset = end
    metadata = {"crc32c": json.dumps(checksums, separators=(",", ":"))}
    body = json.dumps({"__metadata__": metadata, **tree}, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def _record(key: str, header: bytes, slices: StateSlices) -> FileRecord:
    return FileRecord(
        key=key.rpartition("/")[2],
        bytes=len(header) + sum(4 * slice_.length for _, slice_ in slices),
        header_bytes=len(header),
        header_sha256=hashlib.sha256(header).hexdigest(),
    )


def _stored_slices(header: bytes) -> Iterator[StoredSlice]:
    tree = json.loads(header[_LENGTH_BYTES:])
    checksums = json.loads(tree.pop("__metadata__")["crc32c"])
    for name, entry in tree.items():
        kind, _, rest = name.partition("/")
        parameter, _, start = rest.rpartition("@")
        first, end = entry["data_offsets"]
        yield StoredSlice(
            kind=kind,
            parameter=parameter,
            start=int(start),
            length=(end - first) // 4,
            byte_offset=len(header) + first,
            crc32c=tuple(checksums[name]),
        )


def _chain(first: memoryview, rest: Iterable[memoryview]) -> Iterator[memoryview]:
    yield first
    yield from rest
