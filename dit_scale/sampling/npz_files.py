"""The sample file of the ADM evaluation suite, written and read as a stream.

It is an npz file: `arr_0` holds the images (N, H, W, 3) uint8, `arr_1` their classes (N,) int64. The bytes
depend only on the arrays: members are stored uncompressed, with a fixed date. Zip keeps a CRC-32 of each.

Shapes: N images, H W pixels.
"""

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from dit_scale.errors import DataError
from dit_scale.storage.outputs import new_file

IMAGES, LABELS = "arr_0.npy", "arr_1.npy"
_DATE = (1980, 1, 1, 0, 0, 0)
"""The date of every member, the earliest that zip can express."""
_CHUNK_BYTES = 2**22
_DAMAGED = (zipfile.BadZipFile, EOFError, KeyError, ValueError, NotImplementedError, RuntimeError)
"""What reading damaged bytes raises."""


def write_npz(parts: Iterable[np.ndarray], labels_N: np.ndarray, path: Path) -> None:
    """Write consecutive parts of the images, each (n, H, W, 3) uint8, and all labels, atomically.

    Only one part is in memory at a time.
    """
    iterator = iter(parts)
    first = next(iterator)
    shape = (len(labels_N), *first.shape[1:])
    with new_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with _member(archive, IMAGES, np.dtype(np.uint8), shape) as file:
            count = 0
            for part in _chain(first, iterator):
                assert part.dtype == np.uint8
                assert part.shape[1:] == shape[1:]
                file.write(np.ascontiguousarray(part).data)
                count += len(part)
            assert count == len(labels_N)
        with _member(archive, LABELS, np.dtype("<i8"), labels_N.shape) as file:
            file.write(np.ascontiguousarray(labels_N, dtype="<i8").data)


def read_images(path: Path, num_per_part: int) -> Iterator[np.ndarray]:
    """Yield the images in parts of `num_per_part`, the last one shorter. Raises DataError if damaged.

    The zip file's checksum covers all images, so damage may be found only at the end.
    """
    with damage(path), zipfile.ZipFile(path) as archive, archive.open(IMAGES) as file:
        count, height, width, channels = _read_header(file)
        image_bytes = height * width * channels
        for start in range(0, count, num_per_part):
            num = min(num_per_part, count - start)
            data = file.read(num * image_bytes)
            yield np.frombuffer(data, dtype=np.uint8).reshape(num, height, width, channels)
        if file.read(1):
            raise ValueError("more bytes than images")


def read_labels(path: Path) -> np.ndarray:
    """Read the classes => (N,) int64. Raises DataError if damaged."""
    with damage(path), zipfile.ZipFile(path) as archive, archive.open(LABELS) as file:
        labels_N: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        return labels_N


def check_npz(path: Path) -> None:
    """Read the complete file back and compare its checksums. Raises DataError if it is damaged."""
    with damage(path), zipfile.ZipFile(path) as archive:
        for name in (IMAGES, LABELS):
            with archive.open(name) as file:
                while file.read(_CHUNK_BYTES):
                    pass


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turn whatever damaged bytes cause into DataError that names the file."""
    try:
        yield
    except _DAMAGED as error:
        raise DataError(f"{path} is damaged ({error})") from None


def _read_header(file: IO[bytes]) -> tuple[int, int, int, int]:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"npy version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype != np.uint8 or len(shape) != 4:
        raise ValueError(f"expected uint8 (N, H, W, 3), got {dtype} {shape}")
    count, height, width, channels = shape
    return count, height, width, channels


@contextmanager
def _member(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Iterator[IO[bytes]]:
    info = zipfile.ZipInfo(name, _DATE)
    info.create_system, info.external_attr = 3, 0o644 << 16
    with archive.open(info, "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest
