"""The interface of an input: images listed in one order, each readable by its entry in the listing.

Shapes: N images of the listing.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dit_scale.errors import DataError
from dit_scale_pipeline.inputs.names import printable

COLUMNS = ("image", "label")
"""Default names of the image and label columns in Parquet files."""

ListingProgress = Callable[[int, int], None]
"""Called with the number of archives listed so far and the total."""


def no_progress(done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A file that contains many images."""

    name: str
    """Key relative to the input's folder."""
    bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of the listing."""

    key: int
    """Position in the listing."""
    path: str
    label: int
    archive: str = ""
    """Name of the archive that contains it; empty for an image file."""
    start: int = 0
    """Position in the archive: the first byte of its headers in a tar, or its row in a Parquet file."""
    size: int = 0
    """Size of its headers and data in a tar."""


@dataclass(frozen=True)
class Listing:
    """All images of an input, sorted bytewise by path."""

    kind: str
    class_names: tuple[str, ...]
    paths: Sequence[str]
    """(N,) relative paths, or path-like names in an archive; all distinct."""
    labels: npt.NDArray[np.int32]
    """(N,)"""
    labels_in_paths: bool = True
    """Whether the paths determine the labels: their first components are the sorted class names."""
    archives: tuple[Archive, ...] = ()
    archive_numbers: npt.NDArray[np.int32] | None = None
    """(N,) indices into `archives`; None when every image is a file."""
    starts: npt.NDArray[np.int64] | None = None
    """(N,) as in `Entry`."""
    sizes: npt.NDArray[np.int64] | None = None
    """(N,) as in `Entry`."""
    ignored: tuple[str, ...] = ()
    """Paths left out of the listing: files without a class, and hidden files and folders (with a slash)."""
    columns: tuple[str, str] = COLUMNS
    """Image and label columns of Parquet files."""

    def __len__(self) -> int:
        return len(self.paths)

    def entries(self, rows: range | None = None) -> tuple[Entry, ...]:
        """Return the entries of some rows, or of all."""
        return tuple(self._entry(row) for row in (range(len(self)) if rows is None else rows))

    def _entry(self, row: int) -> Entry:
        path, label = self.paths[row], int(self.labels[row])
        if self.archive_numbers is None or self.starts is None or self.sizes is None:
            return Entry(row, path, label)
        archive = self.archives[self.archive_numbers[row]].name
        start, size = int(self.starts[row]), int(self.sizes[row])
        return Entry(row, path, label, archive=archive, start=start, size=size)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all paths, each followed by a zero byte: `find * -mindepth 1 -type f -print0 | sort -z`.

        Ignored paths are not included. If the paths do not determine the labels, each path is also followed
        by its label and a zero byte. An image column with another name than `image` prepends that name and
        two zero bytes.
        """
        digest = hashlib.sha256()
        if self.columns[0] != COLUMNS[0]:
            digest.update(self.columns[0].encode() + b"\0\0")
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            digest.update(os.fsencode(path) + b"\0")
            if not self.labels_in_paths:
                digest.update(b"%d\0" % label)
        return digest.hexdigest()

    @property
    def empty_classes(self) -> tuple[str, ...]:
        """Names of the classes without an image."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return tuple(name for name, count in zip(self.class_names, counts, strict=True) if not count)


def sorted_rows(paths: Sequence[str], where: str) -> npt.NDArray[np.int64]:
    """Return the rows in bytewise order of their paths; DataError for a duplicate path."""
    order = sorted(range(len(paths)), key=lambda row: os.fsencode(paths[row]))
    for one, other in pairwise(order):
        if paths[one] == paths[other]:
            raise DataError(f"{where}: duplicate path {printable(paths[one])}; rename one of the images")
    return np.array(order, np.int64)


class Input(ABC):
    """Images on disk or S3. Each reading process creates its own; creation reads nothing."""

    kind: str
    url: str
    remote: bool
    """Whether reads go over a network and therefore run in parallel."""
    columns: tuple[str, str] = COLUMNS

    @abstractmethod
    def archives(self) -> tuple[Archive, ...]:
        """Return the current archives, to compare with a saved listing; empty when images are files."""

    @abstractmethod
    def list(self, progress: ListingProgress = no_progress) -> Listing:
        """List all images; DataError when there are none or an archive is damaged."""

    @abstractmethod
    def read(self, entry: Entry) -> bytes:
        """Return the bytes of an image; thread-safe.

        Raises InputError when it cannot become a sample, DataError when it has changed since it was listed,
        and StorageError.
        """
