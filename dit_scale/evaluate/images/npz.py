"""Images in an npz file: `arr_0`, uint8 (N, H, W, 3), as the ADM evaluation suite writes samples.

A file of 50,000 images has 9.8 GB, so it is never in memory: members that are stored are read in place, and
compressed ones as a stream. Pickled arrays are refused, because loading them would run code of the file.

Shapes: N images, H W pixels.
"""

import hashlib
import struct
import zipfile
import zlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dit_scale.data.pixels import Pixels
from dit_scale.errors import DataError
from dit_scale.evaluate.images.base import BLOCK_BYTES, file_sha256

IMAGES = "arr_0"
_LOCAL_HEADER = struct.Struct("<26xHH")
"""The end of a member's local header: lengths of its name and of its extra field."""
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError)


class NpzFile:
    """The arrays of an npz file by name: their headers, and their data on demand. Nothing is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            head = file.read(8)
        if head[:1] == b"\x80":
            raise DataError(f"{path} is a pickle, which can run code when it is loaded; expected an npz file")
        if head[:6] == b"\x93NUMPY":
            raise DataError(f"{path} is one npy array; expected an npz file (numpy.savez)")
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise DataError(
                f"{path} is truncated or no npz file: a zip archive ends with a directory, and this one has "
                "none; copy or write it again"
            ) from None
        self.names = tuple(name.removesuffix(".npy") for name in self._zip.namelist())

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """Return shape, type and length of the header of an array. Raises DataError for a pickled one."""
        try:
            with self._zip.open(f"{name}.npy") as member:
                if np.lib.format.read_magic(member) == (1, 0):
                    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
                else:
                    shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(member)
                length = member.tell()
        except (*_DAMAGE, ValueError) as error:
            raise DataError(f"{self.path}: {name} is damaged or no array ({error})") from None
        if dtype.hasobject:
            raise DataError(
                f"{self.path}: {name} holds pickled objects, which can run code when they are loaded; "
                "save plain arrays"
            )
        if fortran_order and len(shape) > 1:
            raise DataError(f"{self.path}: {name} is in Fortran order; save it in C order")
        return shape, dtype, length

    def array(self, name: str) -> npt.NDArray[Any]:
        """Load a whole array and verify its checksum. Raises DataError."""
        self.header(name)
        try:
            with self._zip.open(f"{name}.npy") as member:
                loaded: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
                if member.read(1):
                    raise DataError(f"{self.path}: {name} is longer than its header says")
                return loaded
        except (*_DAMAGE, ValueError) as error:
            raise DataError(f"{self.path}: {name} is damaged ({error})") from None

    def sha256(self) -> str:
        """Return the SHA-256 of the file."""
        return file_sha256(self.path)

    def member(self, name: str) -> zipfile.ZipInfo:
        """Return where the archive holds an array."""
        return self._zip.getinfo(f"{name}.npy")

    def stream(self, name: str) -> IO[bytes]:
        """Open the bytes of an array, header included."""
        return self._zip.open(f"{name}.npy")


class NpzImages:
    """The images of an npz file."""

    def __init__(self, path: str | Path) -> None:
        self.source = str(path)
        self._npz = NpzFile(Path(path))
        if IMAGES not in self._npz.names:
            raise DataError(
                f"{path} has no {IMAGES}; it has {', '.join(self._npz.names) or 'nothing'}. Expected "
                f"{IMAGES}, uint8 (N, H, W, 3), as `dit-scale sample` writes"
            )
        shape, dtype, header_bytes = self._npz.header(IMAGES)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or not min(shape):
            raise DataError(
                f"{path}: expected {IMAGES} uint8 (N, H, W, 3) with H = W, got {dtype} {shape}; evaluation "
                "reads images of 8 bits in the order height, width, channel"
            )
        self.count, self.image_size = shape[0], shape[1]
        self.preparation = "pixels as stored"
        self._image_bytes = 3 * shape[1] * shape[2]
        member = self._npz.member(IMAGES)
        if member.file_size != header_bytes + self.count * self._image_bytes:
            raise DataError(
                f"{path} is damaged: {IMAGES} has {member.file_size} bytes, not those of {self.count} images"
            )
        # A stored member is read from the file itself, a compressed one from its decompressed stream.
        is_stored = member.compress_type == zipfile.ZIP_STORED
        self._stream = None if is_stored else self._npz.stream(IMAGES)
        self._header_bytes = header_bytes
        self._start = header_bytes + (self._member_start(member) if is_stored else 0)

    def digest(self) -> str:
        """Return the SHA-256 of the file, the one that samples.json records; verifies a stored array."""
        member, position, checksum = self._npz.member(IMAGES), 0, 0
        first = self._start - self._header_bytes
        last = first + member.file_size
        hasher = hashlib.sha256()
        with self._npz.path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                hasher.update(block)
                inside = memoryview(block)[max(0, first - position) : max(0, last - position)]
                checksum = zlib.crc32(inside, checksum)
                position += len(block)
        if self._stream is None and checksum != member.CRC:
            raise DataError(
                f"{self.source} is damaged: the checksum of {IMAGES} is wrong; copy or write it again"
            )
        return hasher.hexdigest()

    def read(self, images: range) -> Pixels:
        """Read a range of images => (N, H, W, 3)."""
        try:
            with self._stream_or_file() as file:
                file.seek(self._start + images.start * self._image_bytes)
                data = file.read(len(images) * self._image_bytes)
        except _DAMAGE as error:
            raise DataError(f"{self.source} is damaged ({error}); copy or write it again") from None
        if len(data) != len(images) * self._image_bytes:
            raise DataError(f"{self.source} is truncated at image {images.start}; copy or write it again")
        return np.frombuffer(data, np.uint8).reshape(-1, self.image_size, self.image_size, 3)

    def _stream_or_file(self) -> AbstractContextManager[IO[bytes]]:
        """Open the file, or return the stream, which stays open because it decompresses forwards."""
        return self._npz.path.open("rb") if self._stream is None else nullcontext(self._stream)

    def _member_start(self, member: zipfile.ZipInfo) -> int:
        """Return the offset of a member's first byte; its local header differs from that of the directory."""
        with self._npz.path.open("rb") as file:
            file.seek(member.header_offset)
            name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        return member.header_offset + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)
