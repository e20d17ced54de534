"""A small separate file system for tests, which fills up and can be remounted."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import which

from tests.support.needs import needs

MARGIN_BLOCKS = 1024
"""Blocks that others may take while most of the space is allocated; the rest is filled block by block."""


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount one of this size at a new folder and unmount it afterwards. Skips where that is not permitted."""
    needs(which("mount") is not None, "mount: apt-get install mount")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    needs(mounted.returncode == 0, f"permission to mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Use up all free space, most of it by one call, which takes less than a second; return the filler."""
    filler = disk / "filler"
    space = os.statvfs(disk)
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, max(1, (space.f_bavail - MARGIN_BLOCKS) * space.f_frsize))
        file.seek(0, os.SEEK_END)
        while True:
            file.write(bytes(space.f_frsize))
    return filler
