"""Class folders: one sub-folder of image files per class, on disk or under an s3:// prefix."""

import os
from pathlib import Path

import numpy as np

from dit_scale.errors import DataError
from dit_scale.storage import DiskStorage, MissingKeyError, Storage
from dit_scale_pipeline.inputs.base import (
    Archive,
    Entry,
    Input,
    InputError,
    Listing,
    Progress,
    in_order,
    silent,
)
from dit_scale_pipeline.inputs.places import KINDS


class ClassFolders(Input):
    """Labels count the folders in bytewise order, the empty ones too."""

    kind = "class_folders"

    def __init__(self, storage: Storage) -> None:
        self.url = storage.url
        self.remote = not isinstance(storage, DiskStorage)
        self._storage = storage

    def archives(self) -> tuple[Archive, ...]:
        return ()

    def list(self, progress: Progress = silent) -> Listing:
        storage = self._storage
        paths, folders = _walk(storage) if isinstance(storage, DiskStorage) else _list(storage)
        inside = [path for path in paths if "/" in path]
        if not inside:
            raise DataError(f"{self.url}: expected {KINDS}. Found no file in any folder, and no archive")
        class_names = sorted(folders, key=os.fsencode)
        label = {name: number for number, name in enumerate(class_names)}
        ordered = [inside[row] for row in in_order(inside, self.url)]
        return Listing(
            kind=self.kind,
            class_names=tuple(class_names),
            paths=ordered,
            labels=np.array([label[path.partition("/")[0]] for path in ordered], np.int32),
            ignored=tuple(sorted((path for path in paths if "/" not in path), key=os.fsencode)),
        )

    def read(self, entry: Entry) -> bytes:
        try:
            return self._storage.read(entry.path)
        except MissingKeyError:
            local = self._storage.local_path(entry.path)
            if local is not None and local.is_symlink():
                raise InputError("a link to nothing") from None
            raise DataError(
                f"{self.url}/{entry.path} is in the listing but not here; if it was deleted, begin another "
                "output, else make the source visible on every node and start again"
            ) from None


def _walk(storage: DiskStorage) -> tuple[list[str], set[str]]:
    if not storage.folder.is_dir():
        raise DataError(f"no folder at {storage.folder}; expected {KINDS}")
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
