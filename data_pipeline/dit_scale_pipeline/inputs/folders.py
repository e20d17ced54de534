"""Class folders: one sub-folder of image files per class, on disk or under an s3:// prefix."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from dit_scale_pipeline.inputs.contents import UNPACK, compressed, is_compressed
from dit_scale_pipeline.inputs.layout import check_folders, check_names
from dit_scale_pipeline.inputs.names import few, hidden_part, is_hidden, is_other_kind, shown
from dit_scale_pipeline.inputs.places import ARCHIVE_SUFFIXES, KINDS, listing_errors, pattern_of
from dit_scale_pipeline.inputs.webdataset import IMAGE_SUFFIXES


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
        found = _walk(storage) if isinstance(storage, DiskStorage) else _list(storage)
        _refuse_archives(self.url, found.inside)
        images = [path for path in found.inside if not is_other_kind(path)]
        others = [path for path in found.inside if is_other_kind(path)]
        if not images:
            raise DataError(f"{self.url}: expected {KINDS}. Found {_instead([*others, *found.outside])}")
        class_names = sorted(found.folders, key=os.fsencode)
        check_names(self.url, class_names)
        check_folders(self.url, class_names, images)
        label = {name: number for number, name in enumerate(class_names)}
        ordered = [images[row] for row in in_order(images, self.url)]
        return Listing(
            kind=self.kind,
            class_names=tuple(class_names),
            paths=ordered,
            labels=np.array([label[path.partition("/")[0]] for path in ordered], np.int32),
            ignored=tuple(sorted((*found.outside, *others, *found.left_out), key=os.fsencode)),
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


_Inode = tuple[int, int]
"""Device and number: what a folder is, whatever links lead to it."""


@dataclass
class _FolderTree:
    """What lies below a place, by paths."""

    folders: set[str] = field(default_factory=set)
    """Those at the top, empty ones too."""
    inside: list[str] = field(default_factory=list)
    """Files in folders."""
    outside: list[str] = field(default_factory=list)
    """Files in none."""
    left_out: set[str] = field(default_factory=set)
    """Files and folders (with a slash) that are hidden, or a system's, or markers of nothing."""


def _walk(storage: DiskStorage) -> _FolderTree:
    """A disk's files. Raises StorageError for a folder that cannot be read, DataError for what is no file."""
    found = _FolderTree()
    top = storage.folder
    with listing_errors(top):
        if not top.is_dir():
            raise DataError(f"no folder at {top}; expected {KINDS}")
        left: list[tuple[str, tuple[_Inode, ...]]] = [("", (_inode(top),))]
        while left:
            folder, above = left.pop()
            with os.scandir(top / folder) as children:
                for child in children:
                    path = f"{folder}/{child.name}" if folder else child.name
                    if is_hidden(child.name):
                        # What it is does not matter: lost+found cannot be read by everybody.
                        found.left_out.add(f"{path}/" if child.is_dir(follow_symlinks=False) else path)
                    elif child.is_dir():
                        left.append((path, (*above, _new_inode(top / path, above))))
                    else:
                        _check_file(child)
                        (found.inside if folder else found.outside).append(path)
            if folder and "/" not in folder:
                found.folders.add(folder)
    return found


def _inode(folder: Path) -> _Inode:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _new_inode(folder: Path, above: Sequence[_Inode]) -> _Inode:
    """Identity of a folder; DataError when it is one of those that it lies in."""
    if (inode := _inode(folder)) in above:
        raise DataError(
            f"{shown(str(folder))} is a link to {shown(os.path.realpath(folder))}, which holds the link: its "
            "images would be listed without end. Remove the link"
        )
    return inode


def _check_file(child: "os.DirEntry[str]") -> None:
    """DataError for what no image can be: reading a pipe would wait for ever. A link may lead to nothing."""
    if not child.is_file() and (not child.is_symlink() or os.path.exists(child.path)):
        raise DataError(f"{shown(child.path)} is a pipe, a socket or a device; expected files. Remove it")


def _list(storage: Storage) -> _FolderTree:
    """Objects under a prefix."""
    found, markers = _FolderTree(), set()
    for key in filter(None, (key for key, _ in storage.list())):
        parts = key.removesuffix("/").split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise DataError(
                f"{storage.url}/{shown(key)}: expected a key without empty parts, '.' or '..', as a path "
                "has it. Copy the object to such a key, or delete it"
            )
        if hidden := hidden_part(key):
            found.left_out.add(hidden)
        elif key.endswith("/"):
            markers.add(f"{parts[0]}/")
        elif len(parts) > 1:
            found.folders.add(parts[0])
            found.inside.append(key)
        else:
            found.outside.append(key)
    found.left_out |= markers - {f"{folder}/" for folder in found.folders}
    return found


def _refuse_archives(url: str, paths: Sequence[str]) -> None:
    """DataError when the files of a folder are archives and what accompanies them."""
    by_folder = defaultdict(list)
    for path in paths:
        by_folder[path.partition("/")[0]].append(path)
    for inside in by_folder.values():
        archives = [path for path in inside if path.endswith(ARCHIVE_SUFFIXES) or is_compressed(path)]
        others = set(inside) - set(archives)
        if archives and all(map(is_other_kind, others)):
            named = f"source={url.rstrip('/')}/{pattern_of(archives[0])}"
            raise DataError(
                f"{url}: expected images in the folders, found archives ({few(archives)}). "
                + (f"Name them: {named}" if archives[0].endswith(ARCHIVE_SUFFIXES) else UNPACK.capitalize())
            )


def _instead(found: Sequence[str]) -> str:
    """What lies in a folder without images in folders, and what to do with it."""
    files = sorted(found, key=os.fsencode)
    if packed := compressed(files):
        return packed
    if images := [name for name in files if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES]:
        return (
            f"{len(images)} images in no folder ({few(images)}): move them into one folder per class. "
            "Images without classes are one class, in one folder"
        )
    return "no image in any folder, and no archive" + (f", only {few(files)}" if files else "")
