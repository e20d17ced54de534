"""Where the files of an input lie: the top of a folder or prefix, or those of it that a pattern names."""

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dit_scale.errors import DataError, StorageError
from dit_scale.storage import DiskStorage, Storage, open_storage

ARCHIVE_SUFFIXES = (".parquet", ".tar")

_GLOB = re.compile(r"[*?]")


@dataclass(frozen=True)
class Place:
    """A folder or prefix; with a pattern, only the files at its top that match."""

    url: str
    storage: Storage
    pattern: str = ""
    """A file's name, or names with * and ?; empty for all files."""

    @property
    def remote(self) -> bool:
        """Whether each read waits for a network."""
        return not isinstance(self.storage, DiskStorage)

    def top(self) -> tuple[dict[str, int], set[str]]:
        """Files at the top => bytes, and names of the folders there; nothing that is hidden."""
        if isinstance(self.storage, DiskStorage):
            sizes, folders = _scan(self.storage, self)
        else:
            head = _GLOB.split(self.pattern)[0]
            listed = [(key, size) for key, size in self.storage.list(head) if key]
            sizes = {key: size for key, size in listed if "/" not in key and self.matches(key)}
            folders = {key.partition("/")[0] for key, _ in listed if "/" in key}
        return dict(sorted(sizes.items())), {name for name in folders if not name.startswith(".")}

    def matches(self, name: str) -> bool:
        """Whether a file at the top belongs to the place."""
        if not self.pattern:
            return not name.startswith(".")
        # Only * and ? are special: a bracket is a letter like others.
        return name == self.pattern or fnmatchcase(name, self.pattern.replace("[", "[[]"))


def locate(source: str) -> Place:
    """What a source names: a folder, one archive, or a pattern of archives; looks at nothing remote."""
    storage = open_storage(source)
    local = storage.folder if isinstance(storage, DiskStorage) else None
    if local is not None and local.is_dir():
        return Place(source, storage)
    parent, slash, last = source.rstrip("/").rpartition("/")
    is_pattern = _GLOB.search(last) or (last.endswith(ARCHIVE_SUFFIXES) and not source.endswith("/"))
    if is_pattern or (local is not None and local.is_file()):
        return Place(source, open_storage(parent or ("/" if slash else ".")), last)
    return Place(source, storage)


def _scan(storage: DiskStorage, place: Place) -> tuple[dict[str, int], set[str]]:
    if not storage.folder.is_dir():
        raise DataError(f"no folder at {storage.folder}; expected images: {KINDS}")
    try:
        with os.scandir(storage.folder) as children:
            is_folder = {child.name: child.is_dir() for child in children}
        names = [name for name, folder in is_folder.items() if not folder and place.matches(name)]
        return {name: storage.size(name) for name in names}, {n for n, folder in is_folder.items() if folder}
    except OSError as error:
        raise StorageError(f"cannot list {storage.folder}: {error.strerror}") from error


KINDS = (
    "one folder of images per class; ILSVRC2012_img_train.tar or a folder of its class tars; WebDataset "
    "tars; Parquet files with columns image and label"
)
"""What an input may be, in words."""
