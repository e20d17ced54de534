"""From class folders of picture files to square uint8 arrays: listing, decoding, the ADM crop.

Everything here is a pure function of the files' bytes: no EXIF rotation, no approximate JPEG scaling.
A file that is no picture is not skipped but reported, with a reason that is the same on every machine.
"""

import functools
import hashlib
import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dit_scale.errors import DataError
from dit_scale.storage import DiskStorage, MissingKeyError, Storage, open_storage

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take the contents for, whatever the name says; none of them runs a program."""
MAX_PIXELS = 2**27
"""Largest image before or after a resize; more is a damaged header or a strip, and would fill the memory."""

CROP = "adm_center"
"""Name of `center_crop` in dataset.json."""

Pixels = npt.NDArray[np.uint8]


class ImageError(Exception):
    """Why one input gives no sample; the message is its reason in the quarantine list."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the listing; `key` is its place in it."""

    key: int
    path: str
    label: int


@dataclass(frozen=True)
class Listing:
    """All files in class folders, sorted bytewise by relative path."""

    entries: tuple[Entry, ...]
    class_names: tuple[str, ...]
    empty_classes: tuple[str, ...]
    """Class folders without a file; they keep their label."""
    outside: tuple[str, ...]
    """Files beside the class folders: they have no class and are not part of the listing."""
    sha256: str
    """Of every relative path and a zero byte, in order: `find * -mindepth 1 -type f -print0 | sort -z`."""


def list_images(source: str) -> Listing:
    """The files of a folder (or s3:// prefix) with one sub-folder per class; labels count sorted folders.

    DataError when it is not there or holds no file in a class folder.
    """
    storage = open_storage(source)
    paths, folders = _walk(storage) if isinstance(storage, DiskStorage) else _list(storage)
    inside = sorted((path for path in paths if "/" in path), key=os.fsencode)
    if not inside:
        raise DataError(f"{source}: expected one folder of images per class, found no file in any folder")
    class_names = sorted(folders, key=os.fsencode)
    label = {name: number for number, name in enumerate(class_names)}
    entries = tuple(Entry(key, path, label[path.partition("/")[0]]) for key, path in enumerate(inside))
    used = {entry.label for entry in entries}
    digest = hashlib.sha256()
    for path in inside:
        digest.update(os.fsencode(path) + b"\0")
    return Listing(
        entries=entries,
        class_names=tuple(class_names),
        empty_classes=tuple(name for name in class_names if label[name] not in used),
        outside=tuple(sorted((path for path in paths if "/" not in path), key=os.fsencode)),
        sha256=digest.hexdigest(),
    )


def _walk(storage: DiskStorage) -> tuple[list[str], set[str]]:
    if not storage.folder.is_dir():
        raise DataError(f"no folder at {storage.folder}; expected one sub-folder of images per class")
    with os.scandir(storage.folder) as top:
        children = [(child.name, child.is_dir()) for child in top]
    folders = {name for name, is_folder in children if is_folder}
    paths = [name for name, is_folder in children if not is_folder]
    for name in folders:
        for folder, _, files in os.walk(storage.folder / name, followlinks=True):
            inner = Path(folder).relative_to(storage.folder).as_posix()
            paths += [f"{inner}/{file}" for file in files]
    return paths, folders


def _list(storage: Storage) -> tuple[list[str], set[str]]:
    paths = [key for key, _ in storage.list() if not key.endswith("/")]
    return paths, {path.partition("/")[0] for path in paths if "/" in path}


def decode(data: bytes) -> Image.Image:
    """Bytes of a picture file, whatever its name says => RGB; ImageError when they are not a whole one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF, which is not looked at
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_pixels(image.size)
            return image.convert("RGB")
    except UnidentifiedImageError:
        # Pillow's own message holds an address, which differs between runs.
        raise ImageError("not a picture in a known format") from None
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged bytes
        raise ImageError(f"cannot be decoded: {error}") from None


def _check_pixels(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"too large: {size[0]} x {size[1]} pixels")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve (box) while the short side is >= 2 x size, resize (bicubic), take the center."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    _check_pixels(scaled)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_array(image: Image.Image) -> Pixels:
    """RGB => uint8 (H, W, 3)."""
    return np.asarray(image, dtype=np.uint8)


@dataclass(frozen=True)
class DecodedBatch:
    """What became of some entries: those that gave pixels, in order, and (entry, reason) of the others."""

    good: tuple[Entry, ...]
    bad: tuple[tuple[Entry, str], ...]


def read_batch(source: str, entries: Sequence[Entry], size: int) -> tuple[Pixels, DecodedBatch]:
    """Read, decode and crop entries of a listing => uint8 (good ones, size, size, 3), and their account."""
    storage = _opened(source)
    good: list[Entry] = []
    bad: list[tuple[Entry, str]] = []
    arrays: list[Pixels] = []
    for entry in entries:
        try:
            suffix = PurePosixPath(entry.path).suffix.lower()
            if suffix not in SUFFIXES:
                raise ImageError(f"not an image: extension {suffix!r}")
            arrays.append(to_array(center_crop(decode(_read(storage, entry.path)), size)))
            good.append(entry)
        except ImageError as error:
            bad.append((entry, str(error)))
    pixels = np.stack(arrays) if arrays else np.zeros((0, size, size, 3), np.uint8)
    return pixels, DecodedBatch(tuple(good), tuple(bad))


_opened = functools.lru_cache(maxsize=4)(open_storage)


def _read(storage: Storage, path: str) -> bytes:
    try:
        return storage.read(path)
    except MissingKeyError:
        raise ImageError("there is no such file, or a dangling link") from None
