"""Assemble the files of a sample folder from its committed parts: samples.npz, grid.png, other formats.

Memory holds one tile of images at a time. A part is deleted only after samples.npz has been read back and
the commit mark is written. Any process may assemble; while one does, the others leave it alone.
"""

import errno
import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dit_scale.sampling.image_files import MAX_GRID_IMAGES, write_grid, write_png_folder, write_tar
from dit_scale.sampling.npz_files import check_npz, read_images, write_npz
from dit_scale.sampling.sample_folder import (
    GRID,
    MARK,
    NPZ,
    PROTOCOL,
    SampleFolder,
    discard_mark,
    read_mark,
)
from dit_scale.sealed import sealed
from dit_scale.storage.disk import DiskStorage

FILE_OF = {"npz": NPZ, "png": "png", "tar": "samples.tar"}
"""The file or folder of each format; npz is always written."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def assemble(folder: SampleFolder, labels_N: np.ndarray, formats: Sequence[str] = ("npz",)) -> bool:
    """Write all files that are missing, the commit mark, and delete the parts.

    All images must be committed, or the folder finished; then only formats that it lacks are written.
    Returns False if another process is assembling. Raises DamagedPartError if a part must be made again.
    """
    with _alone(folder.path) as alone:
        if not alone:
            return False
        _clean(folder.path)
        files: dict[str, Any] = {}
        if folder.is_finished():
            files = (read_mark(folder.path) or {})["files"]
        else:
            _discard(folder.path)
            write_npz(folder.images(labels_N), labels_N, folder.path / NPZ)
            check_npz(folder.path / NPZ)
            files[NPZ] = _record(folder.path / NPZ)
            write_grid(_first_images(folder), folder.path / GRID)
            files[GRID] = _record(folder.path / GRID)
        for name in FILE_OF:
            path = folder.path / FILE_OF[name]
            if name in formats and path.name not in files:
                write = write_png_folder if name == "png" else write_tar
                write(read_images(folder.path / NPZ, folder.tile), labels_N.tolist(), path)
                files[path.name] = _record(path)
        mark = {"protocol": folder.protocol, "files": files}
        DiskStorage(folder.path).write(MARK, sealed(mark, indent=1))
        folder.discard_parts()
    return True


def has_formats(folder: SampleFolder, formats: Sequence[str]) -> bool:
    """Whether a finished folder has all of these formats."""
    mark = read_mark(folder.path)
    return mark is not None and all(FILE_OF[name] in mark["files"] for name in formats)


def _first_images(folder: SampleFolder) -> np.ndarray:
    pieces = read_images(folder.path / NPZ, 1)
    return np.concatenate(list(islice(pieces, MAX_GRID_IMAGES)))


def _record(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, or of the files of a folder in the order of their names."""
    sha256, size = hashlib.sha256(), 0
    for file_path in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file_path.open("rb") as file:
            while data := file.read(2**22):
                sha256.update(data)
                size += len(data)
    return {"bytes": size, "sha256": sha256.hexdigest()}


def _discard(path: Path) -> None:
    """Delete the mark of another protocol, then the formats that it lists."""
    listed = discard_mark(path)
    if FILE_OF["tar"] in listed:
        (path / FILE_OF["tar"]).unlink(missing_ok=True)
    if FILE_OF["png"] in listed and (path / FILE_OF["png"]).is_dir():
        shutil.rmtree(path / FILE_OF["png"])


def _clean(path: Path) -> None:
    """Delete files that a killed process was writing."""
    for name in (PROTOCOL, NPZ, GRID, MARK, FILE_OF["tar"]):
        for temporary in path.glob(f".{name}.*.tmp"):
            temporary.unlink()


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Hold the lock of the folder, or yield False if another process holds it; its end releases it."""
    with (path / PROTOCOL).open("rb+") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError as error:
            # Without locks two processes may assemble at once: they write the same bytes.
            if error.errno not in _NO_LOCKS:
                raise
        yield held
