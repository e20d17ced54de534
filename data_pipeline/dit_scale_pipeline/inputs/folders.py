"""Class folders: one subfolder of image files per class, on disk or under an s3:// prefix."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dit_scale.data.pixels import InputError
from dit_scale.errors import DataError
from dit_scale.storage import DiskStorage, MissingKeyError, Storage
from dit_scale_pipeline.inputs.base import (
    Archive,
    Entry,
    Input,
    Listing,
    ListingProgress,
    no_progress,
    sorted_rows,
)
from dit_scale_pipeline.inputs.contents import UNPACK, is_compressed, unpack_advice
from dit_scale_pipeline.inputs.layout import check_folders, check_names
from dit_scale_pipeline.inputs.names import few, hidden_part, is_hidden, is_not_image, printable
from dit_scale_pipeline.inputs.places import ARCHIVE_SUFFIXES, SUPPORTED_SOURCES, listing_errors, pattern_of
from dit_scale_pipeline.inputs.webdataset import IMAGE_SUFFIXES


class ClassFolders(Input):
    """Images in class folders. Labels number the folders in bytewise order, including empty ones."""

    kind = "class_folders"

    def __init__(self, storage: Storage) -> None:
        self.url = storage.url
        self.remote = not isinstance(storage, DiskStorage)
        self._storage = storage

    def archives(self) -> tuple[Archive, ...]:
        return ()

    def list(self, progress: ListingProgress = no_progress) -> Listing:
        storage = self._storage
        tree = _walk(storage) if isinstance(storage, DiskStorage) else _list(storage)
        _refuse_archives(self.url, tree.files)
        images = [path for path in tree.files if not is_not_image(path)]
        others = [path for path in tree.files if is_not_image(path)]
        if not images:
            raise DataError(
                f"{self.url}: expected {SUPPORTED_SOURCES}. Got "
                f"{_describe_content([*others, *tree.top_files])}"
            )
        class_names = sorted(tree.folders, key=os.fsencode)
        check_names(self.url, class_names)
        check_folders(self.url, class_names, images)
        label = {name: number for number, name in enumerate(class_names)}
        ordered = [images[row] for row in sorted_rows(images, self.url)]
        return Listing(
            kind=self.kind,
            class_names=tuple(class_names),
            paths=ordered,
            labels=np.array([label[path.partition("/")[0]] for path in ordered], np.int32),
            ignored=tuple(sorted((*tree.top_files, *others, *tree.ignored), key=os.fsencode)),
        )

    def read(self, entry: Entry) -> bytes:
        try:
            return self._storage.read(entry.path)
        except MissingKeyError:
            local = self._storage.local_path(entry.path)
            if local is not None and local.is_symlink():
                raise InputError("a broken symbolic link") from None
            raise DataError(
                f"{self.url}/{entry.path} is in the listing but does not exist here. If it was deleted, "
                "start a new output; otherwise make the source visible on every node and start again"
            ) from None


_Inode = tuple[int, int]
"""Device and inode number: identify a folder regardless of links."""


@dataclass
class _FolderTree:
    """The paths below a folder or prefix, by their role."""

    folders: set[str] = field(default_factory=set)
    """Folders at the top, including empty ones: the classes."""
    files: list[str] = field(default_factory=list)
    """Files in a folder."""
    top_files: list[str] = field(default_factory=list)
    """Files in no folder."""
    ignored: set[str] = field(default_factory=set)
    """Hidden or system files and folders (with a slash), and empty folder markers."""


def _walk(storage: DiskStorage) -> _FolderTree:
    """List a folder on disk; StorageError for an unreadable folder, DataError for a special file."""
    tree = _FolderTree()
    top = storage.folder
    with listing_errors(top):
        if not top.is_dir():
            raise DataError(f"no folder at {top}; expected {SUPPORTED_SOURCES}")
        left: list[tuple[str, tuple[_Inode, ...]]] = [("", (_inode(top),))]
        while left:
            folder, above = left.pop()
            with os.scandir(top / folder) as children:
                for child in children:
                    path = f"{folder}/{child.name}" if folder else child.name
                    if is_hidden(child.name):
                        # Do not read it: lost+found may be unreadable.
                        tree.ignored.add(f"{path}/" if child.is_dir(follow_symlinks=False) else path)
                    elif child.is_dir():
                        left.append((path, (*above, _new_inode(top / path, above))))
                    else:
                        _check_file(child)
                        (tree.files if folder else tree.top_files).append(path)
            if folder and "/" not in folder:
                tree.folders.add(folder)
    return tree


def _inode(folder: Path) -> _Inode:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _new_inode(folder: Path, above: Sequence[_Inode]) -> _Inode:
    """Return the identity of a folder; DataError when it links to a folder that contains it."""
    if (inode := _inode(folder)) in above:
        raise DataError(
            f"{printable(str(folder))} links to {printable(os.path.realpath(folder))}, which contains the "
            "link: the listing would never end. Remove the link"
        )
    return inode


def _check_file(child: "os.DirEntry[str]") -> None:
    """DataError for a special file: reading a pipe would block forever. A broken link is accepted."""
    if not child.is_file() and (not child.is_symlink() or os.path.exists(child.path)):
        raise DataError(
            f"{printable(child.path)} is a pipe, a socket or a device; expected files and folders. Remove it"
        )


def _list(storage: Storage) -> _FolderTree:
    """List the objects under a prefix."""
    tree, markers = _FolderTree(), set()
    for key in filter(None, (key for key, _ in storage.list())):
        parts = key.removesuffix("/").split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise DataError(
                f"{storage.url}/{printable(key)}: expected a key without empty components, '.' or '..'. Copy "
                "the object to such a key, or delete it"
            )
        if hidden := hidden_part(key):
            tree.ignored.add(hidden)
        elif key.endswith("/"):
            markers.add(f"{parts[0]}/")
        elif len(parts) > 1:
            tree.folders.add(parts[0])
            tree.files.append(key)
        else:
            tree.top_files.append(key)
    tree.ignored |= markers - {f"{folder}/" for folder in tree.folders}
    return tree


def _refuse_archives(url: str, paths: Sequence[str]) -> None:
    """DataError when a folder contains archives instead of images."""
    by_folder = defaultdict(list)
    for path in paths:
        by_folder[path.partition("/")[0]].append(path)
    for inside in by_folder.values():
        archives = [path for path in inside if path.endswith(ARCHIVE_SUFFIXES) or is_compressed(path)]
        others = set(inside) - set(archives)
        if archives and all(map(is_not_image, others)):
            named = f"source={url.rstrip('/')}/{pattern_of(archives[0])}"
            raise DataError(
                f"{url}: expected images in the folders, got archives ({few(archives)}). "
                + (f"Pass them as {named}" if archives[0].endswith(ARCHIVE_SUFFIXES) else UNPACK.capitalize())
            )


def _describe_content(found: Sequence[str]) -> str:
    """Describe what is there instead of class folders, with advice."""
    files = sorted(found, key=os.fsencode)
    if packed := unpack_advice(files):
        return packed
    if images := [name for name in files if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES]:
        return (
            f"{len(images)} images in no folder ({few(images)}): move them into one folder per class, or "
            "into a single folder if they have no classes"
        )
    return "no image in any folder and no archive" + (f", only {few(files)}" if files else "")
