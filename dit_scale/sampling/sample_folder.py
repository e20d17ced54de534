"""A folder of samples while many processes fill it: the protocol, and the parts that are committed.

    protocol.json   written first: everything that the pixels depend on; another protocol is refused
    parts/<first image>-<stop>.<protocol>.npz   one file per commit, atomic, each like samples.npz
    samples.npz, grid.png, ...                  written by `dit_scale.sampling.assembly` from all parts
    samples.json    written last, the commit mark: the protocol, and size and SHA-256 of each file

A part belongs to the protocol whose digest is in its name. Processes never wait for each other: a process
computes images that no part holds, and two processes that compute the same images write the same bytes.

Shapes: N images, H W pixels.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dit_scale.errors import DataError, StorageError
from dit_scale.sampling.npz_files import read_images, read_labels, write_npz
from dit_scale.sealed import sealed, unseal
from dit_scale.storage.base import MissingKeyError
from dit_scale.storage.disk import DiskStorage
from dit_scale.trees import flat

PROTOCOL, MARK, NPZ, GRID = "protocol.json", "samples.json", "samples.npz", "grid.png"
PARTS = "parts"
FORMAT, VERSION = "dit-scale samples", 1
INFORMATIONAL = ("weights.description", "vae.name")
"""Keys of the protocol that may differ: a run or a VAE may have moved."""
_CHOICE = "choose another folder with --out, or replace its samples with --overwrite"
_PART = re.compile(r"(\d+)-(\d+)\.([0-9a-f]{8})\.npz")


class DamagedPartError(DataError):
    """A committed part cannot be read."""

    def __init__(self, path: Path, images: range, reason: str) -> None:
        super().__init__(f"{path} (images {images.start} to {images.stop - 1}) is damaged: {reason}")
        self.path, self.images = path, images


class SampleFolder:
    """The parts of one protocol in a folder. `claim` makes one."""

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        self.path, self.protocol = path, protocol
        self.num_images: int = protocol["images"]
        self.tile: int = protocol["sampling"]["tile"]
        text = json.dumps(_leaves(protocol), sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def num_tiles(self) -> int:
        """Number of tiles; the last one may be short."""
        return -(-self.num_images // self.tile)

    def parts(self) -> list[tuple[range, Path]]:
        """List image numbers and files of the committed parts, by first image, the longest first."""
        found = []
        for path in _files(self.path / PARTS):
            match = _PART.fullmatch(path.name)
            if match and match[3] == self._key:
                found.append((range(int(match[1]), int(match[2])), path))
        return sorted(found, key=lambda part: (part[0].start, -part[0].stop))

    def committed_tiles(self) -> np.ndarray:
        """Return for each tile whether it is committed, bool."""
        done = np.zeros(self.num_tiles, dtype=bool)
        for images, _ in self.parts():
            done[images.start // self.tile : -(-images.stop // self.tile)] = True
        return done

    def num_committed(self) -> int:
        """Count the committed images."""
        done = self.committed_tiles()
        short = self.num_tiles * self.tile - self.num_images if done[-1] else 0
        return int(done.sum()) * self.tile - short

    def commit(self, first: int, images_NHW3: np.ndarray, labels_N: np.ndarray) -> None:
        """Commit consecutive images, beginning with number `first`."""
        name = f"{first:08}-{first + len(images_NHW3):08}.{self._key}.npz"
        write_npz([images_NHW3], labels_N, self.path / PARTS / name)

    def images(self, labels_N: np.ndarray) -> Iterator[np.ndarray]:
        """Yield all images in order, in pieces of at most a tile.

        Raises DamagedPartError, or DataError if a part is missing.
        """
        position = 0
        for images, path in self.parts():
            if images.stop <= position:  # two runs with different batches may have committed it twice
                continue
            self._require(images.start <= position, position)
            try:
                if not np.array_equal(read_labels(path), labels_N[images.start : images.stop]):
                    raise DataError("its classes are not those of the protocol")
                start = images.start
                for piece in read_images(path, self.tile):
                    yield piece[max(0, position - start) :]
                    start += len(piece)
                if start != images.stop:
                    raise DataError(f"expected {len(images)} images, got {start - images.start}")
            except DataError as error:
                raise DamagedPartError(path, images, str(error)) from None
            position = images.stop
        self._require(position == self.num_images, position)

    def _require(self, complete: bool, position: int) -> None:
        if not complete:
            raise DataError(f"{self.path / PARTS} lacks image {position}; the same command samples it again")

    def is_finished(self) -> bool:
        """Whether the commit mark of this protocol is there. Raises DataError if a listed file is not."""
        mark = read_mark(self.path)
        if mark is None or _leaves(mark["protocol"]) != _leaves(self.protocol):
            return False
        for name, record in mark["files"].items():
            path = self.path / name
            if not path.exists() or (path.is_file() and path.stat().st_size != record["bytes"]):
                raise DataError(
                    f"{path}: expected the {record['bytes']} bytes that {MARK} lists; delete "
                    f"{self.path / MARK} to make it again, or choose another folder with --out"
                )
        return True

    def discard_parts(self) -> None:
        """Delete all parts, of other protocols too, and what killed processes left of them."""
        folder = self.path / PARTS
        for path in _files(folder):
            if _PART.fullmatch(path.name) or path.suffix == ".tmp":
                path.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def claim(path: Path, protocol: dict[str, Any], overwrite: bool = False) -> SampleFolder:
    """Write the protocol into a new folder, or check that the folder has the same one.

    `overwrite` accepts a folder of another protocol: its samples are replaced when the new ones are complete.
    Raises StorageError that names what differs.
    """
    protocol = json.loads(json.dumps(protocol))
    storage, data = DiskStorage(path), sealed(protocol, indent=1)
    if not overwrite and (path / NPZ).exists() and not (path / PROTOCOL).exists():
        raise StorageError(f"{path} holds {NPZ} without a {PROTOCOL}; {_CHOICE}")
    # An existing protocol is only read: `assemble` deletes temporary files, all of killed processes.
    if storage.exists(PROTOCOL) or not storage.write_new(PROTOCOL, data):
        try:
            found = unseal(storage.read(PROTOCOL), str(path / PROTOCOL), DataError)
        except DataError as error:
            if not overwrite:
                raise DataError(f"{error}; {_CHOICE}") from None
            found = {}
        if _leaves(found) == _leaves(protocol):
            return SampleFolder(path, found)
        if not overwrite:
            raise StorageError(_refusal(path, _leaves(found), _leaves(protocol)))
        storage.write(PROTOCOL, data)
    return SampleFolder(path, protocol)


def read_mark(path: Path) -> dict[str, Any] | None:
    """Read samples.json of a folder: its protocol and files; None if the samples are not complete.

    The samples are not complete either while those of another protocol, in protocol.json, replace them.
    Raises DataError if a file is damaged.
    """
    mark, protocol = _read_sealed(path, MARK), _read_sealed(path, PROTOCOL)
    if mark is None or (protocol is not None and _leaves(mark["protocol"]) != _leaves(protocol)):
        return None
    return mark


def discard_mark(path: Path) -> list[str]:
    """Delete samples.json, of whatever protocol; return the names of the files that it listed."""
    mark = _read_sealed(path, MARK)
    (path / MARK).unlink(missing_ok=True)
    return [] if mark is None else list(mark["files"])


def _read_sealed(path: Path, name: str) -> dict[str, Any] | None:
    try:
        return unseal(DiskStorage(path).read(name), str(path / name), DataError)
    except MissingKeyError:
        return None


def _refusal(path: Path, got: dict[str, str], expected: dict[str, str]) -> str:
    lines = [
        f"\n  {key}: the folder has {got.get(key, 'nothing')}, this command {expected.get(key, 'nothing')}"
        for key in sorted(got.keys() | expected.keys())
        if got.get(key) != expected.get(key)
    ]
    return f"{path} holds samples of another protocol:{''.join(lines)}\n{_CHOICE}"


def _leaves(protocol: dict[str, Any]) -> dict[str, str]:
    """Return dotted keys and their values as JSON, without what pixels do not depend on."""
    return {key: json.dumps(value) for key, value in flat(protocol).items() if key not in INFORMATIONAL}


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [folder / entry.name for entry in entries]
