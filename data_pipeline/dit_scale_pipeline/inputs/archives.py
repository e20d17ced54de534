"""What the inputs share whose images lie in archives: these are listed side by side, and put in one order."""

import os
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from dit_scale.errors import DataError
from dit_scale_pipeline.inputs.base import Archive, Input, Listing, Progress, in_order, silent
from dit_scale_pipeline.inputs.layout import check_names
from dit_scale_pipeline.inputs.names import hidden_part
from dit_scale_pipeline.inputs.places import KINDS, InputPlace
from dit_scale_pipeline.inputs.tars import TarMember

LISTED_AT_ONCE = 8
"""Archives; each holds one window in memory while it is listed."""
MAX_CLASSES = 2**20
"""A larger label is no label."""


@dataclass(frozen=True)
class ArchiveRange:
    """An archive, or an archive in an archive: what one thread lists."""

    number: int
    """Place of the archive in `Input.archives()`."""
    key: str
    start: int
    end: int
    label: int = 0
    """Of its images, where an archive is a class."""
    name: str = ""
    """Of its class, likewise."""


@dataclass
class ArchiveImages:
    """The images of a part, in columns."""

    paths: list[str] = field(default_factory=list)
    labels: "array[int]" = field(default_factory=lambda: array("i"))
    starts: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    class_names: dict[int, str] = field(default_factory=dict)
    """Those that it tells."""
    ignored: list[str] = field(default_factory=list)
    """Files in it that are no images, hidden files and folders (with a slash)."""

    def add(self, path: str, label: int, start: int, size: int) -> None:
        """One more image."""
        self.paths.append(path)
        self.labels.append(label)
        self.starts.append(start)
        self.sizes.append(size)


class ArchiveInput(Input):
    """Archives of one kind at a place."""

    suffix: str
    labels_in_paths = False

    def __init__(self, place: InputPlace) -> None:
        self.url, self.remote = place.url, place.remote
        self.place, self.storage = place, place.storage

    def archives(self) -> tuple[Archive, ...]:
        return self._top()[0]

    def list(self, progress: Progress = silent) -> Listing:
        archives, others = self._top()
        parts, ignored = self.parts(archives)
        found = self._list_all(parts, progress)
        paths = [path for part in found for path in part.paths]
        if not paths:
            raise DataError(f"{self.url}: no image in {len(archives)} archives; expected {KINDS}")
        class_names = self._class_names(found)
        check_names(self.url, class_names)
        order = in_order(paths, self.url)
        numbers = np.repeat([part.number for part in parts], [len(part.paths) for part in found])
        return Listing(
            kind=self.kind,
            class_names=class_names,
            paths=[paths[row] for row in order],
            labels=_joined([part.labels for part in found], np.int32)[order],
            labels_in_paths=self.labels_in_paths,
            archives=archives,
            archive_numbers=numbers.astype(np.int32)[order],
            starts=_joined([part.starts for part in found], np.int64)[order],
            sizes=_joined([part.sizes for part in found], np.int64)[order],
            ignored=_once([*others, *ignored, *(name for part in found for name in part.ignored)]),
            columns=self.columns,
        )

    def parts(self, archives: Sequence[Archive]) -> tuple[Sequence[ArchiveRange], Sequence[str]]:
        """What to list, and what else is in the archives."""
        return [ArchiveRange(number, one.name, 0, one.bytes) for number, one in enumerate(archives)], []

    @abstractmethod
    def list_archive(self, part: ArchiveRange) -> ArchiveImages:
        """The images of one part, in any order."""

    def _list_all(self, parts: Sequence[ArchiveRange], progress: Progress) -> Sequence[ArchiveImages]:
        found = []
        progress(0, len(parts))
        with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
            for done, one in enumerate(pool.map(self.list_archive, parts), 1):
                found.append(one)
                progress(done, len(parts))
        return found

    def _class_names(self, found: Sequence[ArchiveImages]) -> tuple[str, ...]:
        names: dict[int, str] = {}
        for part in found:
            for label, name in part.class_names.items():
                if names.setdefault(label, name) != name:
                    raise DataError(
                        f"{self.url}: label {label} is {names[label]!r} in one place, {name!r} in another; "
                        "expected archives of one data set"
                    )
        largest = max(max(names, default=0), *(max(part.labels, default=0) for part in found))
        return tuple(names.get(label, str(label)) for label in range(largest + 1))

    def _top(self) -> tuple[tuple[Archive, ...], Sequence[str]]:
        """The archives at the place, and what else is there."""
        top = self.place.top()
        archives = (Archive(name, size) for name, size in top.files.items() if name.endswith(self.suffix))
        others = [name for name in top.files if not name.endswith(self.suffix)]
        return tuple(archives), [*others, *top.hidden]


def checked_label(label: int, where: str) -> int:
    """The label itself; DataError for one that cannot be the number of a class."""
    if not 0 <= label < MAX_CLASSES:
        raise DataError(
            f"{where}: label {label}; expected the number of a class. A split without labels (-1) cannot be "
            "encoded"
        )
    return label


def visible(members: Iterable[TarMember], where: str, left_out: list[str]) -> Iterator[TarMember]:
    """The members that are not hidden; `left_out` gets the hidden part of the others, below `where`."""
    for member in members:
        if hidden := hidden_part(member.name):
            left_out.append(f"{where}/{hidden}")
        else:
            yield member


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names), key=os.fsencode))


def _joined(columns: "Sequence[array[int]]", dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(column, dtype) for column in columns])
