"""What an input is: images somewhere, listed in one order, each readable by its entry in the list.

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
from dit_scale_pipeline.inputs.names import shown

COLUMNS = ("image", "label")
"""Names of the columns of images and labels in Parquet files, unless the configuration has others."""

Progress = Callable[[int, int], None]
"""Takes the number of archives that were listed, and that of all."""


def silent(done: int, total: int) -> None:
    """Nobody follows."""


class InputError(Exception):
    """Why one input gives no sample; the message is its reason in the quarantine list.

    It must be a function of the input's bytes: a reason that differs between machines or starts would
    show in the shards' records.
    """


@dataclass(frozen=True, slots=True)
class Archive:
    """A file that holds many images."""

    name: str
    """Key below the input's folder."""
    bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of the listing."""

    key: int
    """Its place in the listing."""
    path: str
    label: int
    archive: str = ""
    """Name of the archive that holds it; empty when it is a file."""
    start: int = 0
    """Where it is in the archive: the first byte of its headers in a tar, its row in a Parquet file."""
    size: int = 0
    """Bytes of its headers and its data in a tar."""


@dataclass(frozen=True)
class Listing:
    """All images of an input, sorted bytewise by path."""

    kind: str
    class_names: tuple[str, ...]
    paths: Sequence[str]
    """(N,) relative paths, or names as if they were; each one once."""
    labels: npt.NDArray[np.int32]
    """(N,)"""
    labels_in_paths: bool = True
    """Whether the paths alone tell the labels: their first parts are the sorted class names."""
    archives: tuple[Archive, ...] = ()
    archive_numbers: npt.NDArray[np.int32] | None = None
    """(N,) places in `archives`; None when every image is a file."""
    starts: npt.NDArray[np.int64] | None = None
    """(N,) as in `Entry`."""
    sizes: npt.NDArray[np.int64] | None = None
    """(N,) as in `Entry`."""
    ignored: tuple[str, ...] = ()
    """What is no part of the listing: files that have no class, hidden files and folders (with a slash)."""
    columns: tuple[str, str] = COLUMNS
    """Of Parquet files: those of the images and the labels."""

    def __len__(self) -> int:
        return len(self.paths)

    def entries(self, rows: range | None = None) -> tuple[Entry, ...]:
        """The entries of some rows, or of all."""
        return tuple(self._entry(row) for row in (range(len(self)) if rows is None else rows))

    def _entry(self, row: int) -> Entry:
        path, label = self.paths[row], int(self.labels[row])
        if self.archive_numbers is None or self.starts is None or self.sizes is None:
            return Entry(row, path, label)
        archive = self.archives[self.archive_numbers[row]].name
        return Entry(row, path, label, archive, int(self.starts[row]), int(self.sizes[row]))

    @cached_property
    def sha256(self) -> str:
        """Digest of every path and a zero byte, in order: `find * -mindepth 1 -type f -print0 | sort -z`.

        What is left out is not among them. Where the paths do not tell the labels, each path is followed by
        its label and a zero byte too. The name of another image column than `image`, and two zero bytes,
        come first.
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
        """Classes without an image."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return tuple(name for name, count in zip(self.class_names, counts, strict=True) if not count)


def in_order(paths: Sequence[str], where: str) -> npt.NDArray[np.int64]:
    """The order that sorts paths bytewise; DataError when one is there twice."""
    order = sorted(range(len(paths)), key=lambda row: os.fsencode(paths[row]))
    for one, other in pairwise(order):
        if paths[one] == paths[other]:
            raise DataError(
                f"{where}: {shown(paths[one])} is there twice; every image must have a name of its own"
            )
    return np.array(order, np.int64)


class Input(ABC):
    """Images on disk or S3. Objects are made in every process that reads, and cost nothing before that."""

    kind: str
    url: str
    remote: bool
    """Whether each read waits for a network: then several are made at once."""
    columns: tuple[str, str] = COLUMNS

    @abstractmethod
    def archives(self) -> tuple[Archive, ...]:
        """The archives as they are now, which a saved listing must agree with; none when images are files."""

    @abstractmethod
    def list(self, progress: Progress = silent) -> Listing:
        """All images. DataError when there are none, or when an archive is damaged."""

    @abstractmethod
    def read(self, entry: Entry) -> bytes:
        """The bytes of an image; threads may share the input.

        Raises InputError when it cannot be a sample, DataError when it is not what was listed any more,
        StorageError.
        """
