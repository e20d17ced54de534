"""Images in files: a folder, flat or of class folders, or a tar such as a WebDataset shard.

The order is bytewise by path in a folder and that of the members in a tar. Nothing is unpacked.

Shapes: N images, H W pixels.
"""

import hashlib
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dit_scale.data.pixels import CROP, InputError, Pixels, center_crop, decode, to_array
from dit_scale.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_THREADS = 4
"""Images that a process decodes at a time; Pillow's decoders release Python's lock."""


class FileImages(ABC):
    """Images in files of any format; all of one size, or cropped to one."""

    def __init__(self, source: str, names: Sequence[str], crop: int | None) -> None:
        self.source = source
        self.names = names
        self.count = len(names)
        self._crop = crop
        self._pool = ThreadPoolExecutor(_THREADS)
        first = self._decode(0)
        if crop is None and first.width != first.height:
            raise DataError(
                f"{source}: {names[0]} has {first.width} x {first.height} pixels; expected square images. "
                "Pass --crop PIXELS"
            )
        self.image_size = crop or first.width
        self.preparation = f"{CROP} crop to {crop} px" if crop else "pixels as stored"

    @abstractmethod
    def data(self, index: int) -> bytes:
        """Return the bytes of an image file."""

    def digest(self) -> str:
        """Return the SHA-256 of the names and bytes of all files and of the crop."""
        hasher = hashlib.sha256(self.preparation.encode())
        for index, name in enumerate(self.names):
            data = self.data(index)
            for part in (os.fsencode(name), data):
                hasher.update(len(part).to_bytes(8, "little"))
                hasher.update(part)
        return hasher.hexdigest()

    def read(self, images: range) -> Pixels:
        """Decode a range of images => (N, H, W, 3)."""
        return np.stack(list(self._pool.map(self._pixels, images)))

    def _pixels(self, index: int) -> Pixels:
        image = self._decode(index)
        if self._crop is not None:
            try:
                image = center_crop(image, self._crop)
            except InputError as error:
                raise DataError(f"{self.source}: {self.names[index]}: {error}") from None
        if image.size != (self.image_size, self.image_size):
            raise DataError(
                f"{self.source}: mixed sizes: {self.names[0]} has {self.image_size} x {self.image_size} "
                f"pixels, {self.names[index]} has {image.width} x {image.height}; pass --crop PIXELS "
                "to cut all to one size"
            )
        return to_array(image)

    def _decode(self, index: int) -> Image.Image:
        try:
            return decode(self.data(index))
        except InputError as error:
            raise DataError(
                f"{self.source}: {self.names[index]} {error}; repair or remove it, since a score of the "
                "other images would have another number of samples than it says"
            ) from None


class FolderImages(FileImages):
    """All image files below a folder."""

    def __init__(self, folder: str | Path, crop: int | None = None) -> None:
        self._folder = Path(folder)
        names = sorted(_walk(self._folder), key=os.fsencode)
        if not names:
            raise DataError(
                f"{folder} contains no images ({', '.join(SUFFIXES)}); expected images, flat or in class "
                "folders, or the samples.npz of `dit-scale sample`"
            )
        super().__init__(str(folder), names, crop)

    def data(self, index: int) -> bytes:
        return (self._folder / self.names[index]).read_bytes()


class TarImages(FileImages):
    """All image files in an uncompressed tar."""

    def __init__(self, path: str | Path, crop: int | None = None) -> None:
        self._path = Path(path)
        self._places: list[tuple[int, int]] = []
        names: list[str] = []
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    _check_name(path, member.name)
                    if member.isreg() and member.name.lower().endswith(SUFFIXES):
                        names.append(member.name)
                        self._places.append((member.offset_data, member.size))
                end = tar.offset
        except tarfile.TarError as error:
            raise DataError(
                f"{path} is damaged, truncated, compressed or no tar ({error}); copy it again, or unpack it"
            ) from None
        if self._read(end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            # tarfile takes the end of a file for the end of the archive.
            raise DataError(f"{path} is truncated: it has no end-of-archive block; copy it again")
        if not names:
            raise DataError(f"{path} contains no images ({', '.join(SUFFIXES)})")
        super().__init__(str(path), names, crop)

    def data(self, index: int) -> bytes:
        start, size = self._places[index]
        data = self._read(start, size)
        if len(data) != size:
            raise DataError(f"{self.source} is truncated in {self.names[index]}; copy it again")
        return data

    def _read(self, start: int, size: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(start)
            return file.read(size)


def _walk(folder: Path) -> list[str]:
    """Return the relative paths of image files; hidden files and folders are ignored."""
    found = []
    for above, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.relpath(os.path.join(above, name), folder)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return found


def _raise(error: OSError) -> None:
    raise error


def _check_name(path: str | Path, name: str) -> None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise DataError(
            f"{path}: the member {name} would unpack outside of its folder; create the archive again from "
            "inside its folder (tar -C FOLDER)"
        )
