"""Where the files of an input lie: the top of a folder or prefix, or those of it that a pattern names."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dit_scale.errors import DataError, StorageError
from dit_scale.storage import DiskStorage, Storage, open_storage
from dit_scale_pipeline.inputs.names import hidden_part, is_hidden, shown

ARCHIVE_SUFFIXES = (".parquet", ".tar")

_GLOB = re.compile(r"[*?]")


@dataclass(frozen=True)
class InputPlace:
    """A folder or prefix; with a pattern, only the files at its top that match."""

    url: str
    storage: Storage
    pattern: str = ""
    """A file's name, or names with * and ?; empty for all files."""

    @property
    def remote(self) -> bool:
        """Whether each read waits for a network."""
        return not isinstance(self.storage, DiskStorage)

    def top(self) -> "Top":
        """What lies at the top: with a pattern, only the files that match, and all folders."""
        if isinstance(self.storage, DiskStorage):
            sizes, folders = _scan(self.storage, self)
        else:
            head = _GLOB.split(self.pattern)[0]
            listed = [(key, size) for key, size in self.storage.list(head) if key]
            sizes = {key: size for key, size in listed if "/" not in key and self.matches(key)}
            folders = {key.partition("/")[0] for key, _ in listed if "/" in key}
        hidden = [*(hidden_part(name) for name in sizes), *(hidden_part(f"{name}/") for name in folders)]
        return Top(
            dict(sorted((name, size) for name, size in sizes.items() if self.pattern or not is_hidden(name))),
            {name for name in folders if not is_hidden(name)},
            () if self.pattern else tuple(sorted(filter(None, hidden))),
        )

    def matches(self, name: str) -> bool:
        """Whether a file at the top belongs to the place; a pattern matches nothing that is hidden."""
        if not self.pattern or name == self.pattern:
            return True
        # Only * and ? are special: a bracket is a letter like others.
        return not is_hidden(name) and fnmatchcase(name, self.pattern.replace("[", "[[]"))


@dataclass(frozen=True)
class Top:
    """The files and folders at the top of a place."""

    files: dict[str, int]
    """Name => bytes, sorted; hidden ones are not among them."""
    folders: set[str]
    """Those that are not hidden."""
    hidden: tuple[str, ...]
    """Files and folders (with a slash) that are hidden, or a system's."""


def locate(source: str) -> InputPlace:
    """What a source names: a folder, one archive, or a pattern of archives; looks at nothing remote."""
    storage = open_storage(source)
    local = storage.folder if isinstance(storage, DiskStorage) else None
    with listing_errors(source):
        is_folder, is_file = local is not None and local.is_dir(), local is not None and local.is_file()
    if is_folder:
        return InputPlace(source, storage)
    parent, slash, last = source.rstrip("/").rpartition("/")
    is_pattern = _GLOB.search(last) or (last.endswith(ARCHIVE_SUFFIXES) and not source.endswith("/"))
    if is_pattern or is_file:
        return InputPlace(source, open_storage(parent or ("/" if slash else ".")), last)
    return InputPlace(source, storage)


def pattern_of(path: str) -> str:
    """What the archives of a set have in common: all but the numbers in their names."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + re.sub(r"\d+", "*", name)


def overlap(source: str, output: Storage) -> str:
    """How the places of a source and an output overlap, in words; empty when they do not.

    A folder is looked through as a whole. Beside archives that are named, an output may lie.
    """
    place = locate(source)
    theirs, ours = _address(place.storage), _address(output)
    if theirs == ours:
        return "is where the source is"
    if ours.startswith(theirs) and not place.pattern:
        return "lies inside the source"
    return "holds the source" if theirs.startswith(ours) else ""


def _address(storage: Storage) -> str:
    """Where a storage begins, without symbolic links, with a slash at the end."""
    where = os.path.realpath(storage.folder) if isinstance(storage, DiskStorage) else storage.url
    return where.rstrip("/") + "/"


@contextmanager
def listing_errors(where: str | Path) -> Iterator[None]:
    """A listing is complete, or it is none: what the file system refuses is an error, with its path."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot list {shown(str(error.filename or where))}: {error.strerror}. Expected a source that "
            "can be read as a whole and does not change meanwhile: correct the owner, the mode or the disk, "
            "or move what cannot be read out of it"
        ) from error


def _scan(storage: DiskStorage, place: InputPlace) -> tuple[dict[str, int], set[str]]:
    with listing_errors(storage.folder):
        if not storage.folder.is_dir():
            raise DataError(f"no folder at {storage.folder}; expected images: {KINDS}")
        with os.scandir(storage.folder) as children:
            is_folder = {child.name: child.is_dir() for child in children}
    names = [name for name, folder in is_folder.items() if not folder and place.matches(name)]
    # A hidden file may be a link to nothing: editors lock files so.
    sizes = {name: 0 if not place.pattern and is_hidden(name) else storage.size(name) for name in names}
    return sizes, {name for name, folder in is_folder.items() if folder}


KINDS = (
    "one folder of images per class; ILSVRC2012_img_train.tar or a folder of its class tars; WebDataset "
    "tars; Parquet files with columns of images and labels"
)
"""What an input may be, in words."""
