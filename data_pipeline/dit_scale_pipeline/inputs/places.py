"""Where the files of an input are: at the top of a folder or prefix, optionally selected by a pattern."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dit_scale.errors import DataError, StorageError
from dit_scale.storage import DiskStorage, Storage, open_storage
from dit_scale_pipeline.inputs.names import hidden_part, is_hidden, printable

ARCHIVE_SUFFIXES = (".parquet", ".tar")

_GLOB = re.compile(r"[*?]")


@dataclass(frozen=True)
class InputPlace:
    """A folder or prefix; with a pattern, only the matching files at its top."""

    url: str
    storage: Storage
    pattern: str = ""
    """A file name, which may contain * and ?; empty for all files."""

    @property
    def remote(self) -> bool:
        """Whether reads go over a network."""
        return not isinstance(self.storage, DiskStorage)

    def top_level(self) -> "TopLevel":
        """List the top level: all folders, and the files that match the pattern."""
        if isinstance(self.storage, DiskStorage):
            sizes, folders = _scan(self.storage, self)
        else:
            head = _GLOB.split(self.pattern)[0]
            listed = [(key, size) for key, size in self.storage.list(head) if key]
            sizes = {key: size for key, size in listed if "/" not in key and self.matches(key)}
            folders = {key.partition("/")[0] for key, _ in listed if "/" in key}
        hidden = [*(hidden_part(name) for name in sizes), *(hidden_part(f"{name}/") for name in folders)]
        return TopLevel(
            dict(sorted((name, size) for name, size in sizes.items() if self.pattern or not is_hidden(name))),
            {name for name in folders if not is_hidden(name)},
            () if self.pattern else tuple(sorted(filter(None, hidden))),
        )

    def matches(self, name: str) -> bool:
        """Whether a file at the top belongs to the place; a pattern does not match hidden files."""
        if not self.pattern or name == self.pattern:
            return True
        # Only * and ? are special; a bracket is an ordinary character.
        return not is_hidden(name) and fnmatchcase(name, self.pattern.replace("[", "[[]"))


@dataclass(frozen=True)
class TopLevel:
    """The files and folders at the top of a place."""

    files: dict[str, int]
    """Name => size, sorted; without hidden files."""
    folders: set[str]
    """Names, without hidden folders."""
    hidden: tuple[str, ...]
    """Hidden and system files and folders (with a slash)."""


def locate(source: str) -> InputPlace:
    """Parse a source: a folder, one archive, or a pattern of archives; makes no remote request."""
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
    """Return the pattern of a set of archives: a name with its numbers replaced by *."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + re.sub(r"\d+", "*", name)


def overlap(source: str, output: Storage) -> str:
    """Describe how source and output overlap; empty when they do not.

    A source folder is listed recursively. An output may lie next to archives selected by a pattern.
    """
    place = locate(source)
    source_address, output_address = _address(place.storage), _address(output)
    if source_address == output_address:
        return "is the same place as the source"
    if output_address.startswith(source_address) and not place.pattern:
        return "is inside the source"
    return "contains the source" if source_address.startswith(output_address) else ""


def _address(storage: Storage) -> str:
    """Return the address of a storage with symbolic links resolved and a trailing slash."""
    where = os.path.realpath(storage.folder) if isinstance(storage, DiskStorage) else storage.url
    return where.rstrip("/") + "/"


@contextmanager
def listing_errors(where: str | Path) -> Iterator[None]:
    """Turn file system errors into StorageError with the path: a listing is complete or fails."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot list {printable(str(error.filename or where))}: {error.strerror}. The source must be "
            "readable and must not change while it is listed: fix its owner, permissions or disk, or move "
            "the unreadable part out of it"
        ) from error


def _scan(storage: DiskStorage, place: InputPlace) -> tuple[dict[str, int], set[str]]:
    with listing_errors(storage.folder):
        if not storage.folder.is_dir():
            raise DataError(f"no folder at {storage.folder}; expected {SUPPORTED_SOURCES}")
        with os.scandir(storage.folder) as children:
            is_folder = {child.name: child.is_dir() for child in children}
    names = [name for name, folder in is_folder.items() if not folder and place.matches(name)]
    # A hidden file may be a broken link: editors create such lock files.
    sizes = {name: 0 if not place.pattern and is_hidden(name) else storage.size(name) for name in names}
    return sizes, {name for name, folder in is_folder.items() if folder}


SUPPORTED_SOURCES = (
    "one folder of images per class; ILSVRC2012_img_train.tar or a folder of its class tars; WebDataset "
    "tars; Parquet files with columns of images and labels"
)
"""The supported kinds of source, for messages."""
