"""Base of the inputs whose images are in archives: lists the archives in parallel and merges the results."""

import os
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from dit_scale.errors import DataError
from dit_scale_pipeline.inputs.base import Archive, Input, Listing, ListingProgress, no_progress, sorted_rows
from dit_scale_pipeline.inputs.layout import check_names
from dit_scale_pipeline.inputs.names import hidden_part
from dit_scale_pipeline.inputs.places import SUPPORTED_SOURCES, InputPlace
from dit_scale_pipeline.inputs.tars import TarMember

LISTING_THREADS = 8
"""Archives listed in parallel; each needs one read window of memory."""
MAX_CLASSES = 2**20
"""Upper bound of labels; a larger number is not a label."""


@dataclass(frozen=True)
class ArchiveRange:
    """The bytes of one archive, which may be nested in another; one thread lists it."""

    number: int
    """Index of the outer archive in `Input.archives()`."""
    key: str
    start: int
    end: int
    label: int = 0
    """Label of its images, if each archive is a class."""
    name: str = ""
    """Name of its class, if each archive is a class."""


@dataclass
class ArchiveImages:
    """The images of one archive, as columns."""

    paths: list[str] = field(default_factory=list)
    labels: "array[int]" = field(default_factory=lambda: array("i"))
    starts: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    class_names: dict[int, str] = field(default_factory=dict)
    """Class names by label, as far as the archive contains them."""
    ignored: list[str] = field(default_factory=list)
    """Files in it that are not images, and hidden files and folders (with a slash)."""

    def add(self, path: str, label: int, start: int, size: int) -> None:
        """Append an image."""
        self.paths.append(path)
        self.labels.append(label)
        self.starts.append(start)
        self.sizes.append(size)


class ArchiveInput(Input):
    """Archives of one kind at one place."""

    suffix: str
    labels_in_paths = False

    def __init__(self, place: InputPlace) -> None:
        self.url, self.remote = place.url, place.remote
        self.place, self.storage = place, place.storage

    def archives(self) -> tuple[Archive, ...]:
        return self._top()[0]

    def list(self, progress: ListingProgress = no_progress) -> Listing:
        archives, others = self._top()
        ranges, ignored = self.ranges(archives)
        listed = self._list_all(ranges, progress)
        paths = [path for images in listed for path in images.paths]
        if not paths:
            raise DataError(
                f"{self.url}: {len(archives)} archives contain no image; expected {SUPPORTED_SOURCES}"
            )
        class_names = self._class_names(listed)
        check_names(self.url, class_names)
        order = sorted_rows(paths, self.url)
        numbers = np.repeat([one.number for one in ranges], [len(images.paths) for images in listed])
        return Listing(
            kind=self.kind,
            class_names=class_names,
            paths=[paths[row] for row in order],
            labels=_joined([images.labels for images in listed], np.int32)[order],
            labels_in_paths=self.labels_in_paths,
            archives=archives,
            archive_numbers=numbers.astype(np.int32)[order],
            starts=_joined([images.starts for images in listed], np.int64)[order],
            sizes=_joined([images.sizes for images in listed], np.int64)[order],
            ignored=_once([*others, *ignored, *(name for images in listed for name in images.ignored)]),
            columns=self.columns,
        )

    def ranges(self, archives: Sequence[Archive]) -> tuple[Sequence[ArchiveRange], Sequence[str]]:
        """Return the archives to list, which may be nested, and the paths that are ignored."""
        return [ArchiveRange(number, one.name, 0, one.bytes) for number, one in enumerate(archives)], []

    @abstractmethod
    def list_archive(self, archive: ArchiveRange) -> ArchiveImages:
        """List the images of one archive, in any order."""

    def _list_all(self, ranges: Sequence[ArchiveRange], progress: ListingProgress) -> Sequence[ArchiveImages]:
        listed = []
        progress(0, len(ranges))
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            for done, images in enumerate(pool.map(self.list_archive, ranges), 1):
                listed.append(images)
                progress(done, len(ranges))
        return listed

    def _class_names(self, listed: Sequence[ArchiveImages]) -> tuple[str, ...]:
        names: dict[int, str] = {}
        for images in listed:
            for label, name in images.class_names.items():
                if names.setdefault(label, name) != name:
                    raise DataError(
                        f"{self.url}: label {label} is class {names[label]!r} in one archive and {name!r} in "
                        "another; expected archives of one data set"
                    )
        largest = max(max(names, default=0), *(max(images.labels, default=0) for images in listed))
        return tuple(names.get(label, str(label)) for label in range(largest + 1))

    def _top(self) -> tuple[tuple[Archive, ...], Sequence[str]]:
        """Return the archives at the place and the names of everything else there."""
        top = self.place.top_level()
        archives = (Archive(name, size) for name, size in top.files.items() if name.endswith(self.suffix))
        others = [name for name in top.files if not name.endswith(self.suffix)]
        return tuple(archives), [*others, *top.hidden]


def checked_label(label: int, where: str) -> int:
    """Return the label; DataError when it cannot be a class number."""
    if not 0 <= label < MAX_CLASSES:
        raise DataError(
            f"{where}: label {label}; expected a class number. A split without labels (-1) cannot be encoded"
        )
    return label


def visible(members: Iterable[TarMember], where: str, ignored: list[str]) -> Iterator[TarMember]:
    """Yield the members that are not hidden; append the hidden paths, prefixed by `where`, to `ignored`."""
    for member in members:
        if hidden := hidden_part(member.name):
            ignored.append(f"{where}/{hidden}")
        else:
            yield member


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names), key=os.fsencode))


def _joined(columns: "Sequence[array[int]]", dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(column, dtype) for column in columns])
