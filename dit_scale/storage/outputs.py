"""Output files of commands: checked before the work starts, and either complete or absent after it."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dit_scale.errors import StorageError
from dit_scale.storage.disk import DiskStorage, disk_errors


def check_output(path: str | Path, suffix: str = "") -> None:
    """Check that a file of this name can be written, without creating it. Missing parent folders are fine.

    Raises StorageError for a folder, a url, another suffix, or a folder without write permission.
    """
    text, path = str(path), Path(path)
    if "://" in text:
        raise StorageError(f"{text}: expected a file on this machine")
    if suffix and path.suffix != suffix:
        raise StorageError(f"{text}: expected a name that ends in {suffix}")
    with disk_errors(DiskStorage(path.parent), "write", path.name):
        if path.is_dir():
            raise StorageError(f"{text} is a folder, expected the name of a file to write")
        above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise StorageError(f"cannot write {text}: {above} is not a folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise StorageError(
                f"cannot write {text}: no permission to write in {above}; check its owner and mode, and that "
                "the file system is not read-only, or choose another folder"
            )


def check_new_folder(path: str | Path) -> None:
    """Check that a folder of this name can be created, without creating it. Raises StorageError otherwise."""
    if os.path.lexists(path):
        raise StorageError(f"{path} exists; choose another name, or delete it first")
    check_output(path)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the block it atomically becomes `path`, durable.

    After an error `path` is unchanged and the temporary file is deleted. Raises StorageError for disk errors.
    """
    with disk_errors(DiskStorage(path.parent), "write", path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            yield tmp
            _sync(tmp)
            tmp.replace(path)
            _sync(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; at the end of the block it atomically becomes `path`, durable.

    After an error the temporary folder is deleted. Raises StorageError for disk errors, and if `path` exists.
    """
    with disk_errors(DiskStorage(path.parent), "write", path.name):
        check_new_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        tmp.mkdir()
        try:
            yield tmp
            for entry in (*sorted(tmp.rglob("*")), tmp):
                _sync(entry)
            tmp.rename(path)  # fails if a folder with files appeared meanwhile
            _sync(path.parent)
        finally:
            if tmp.exists():
                shutil.rmtree(tmp)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
