"""A small separate file system for tests, which fills up and can be remounted."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import which

from tests.support.needs import needs


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
    """Use up all space that is free now, also in a further call; return the file that takes it."""
    filler = disk / "filler"
    space = os.statvfs(disk)
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        # Nearly all at once, which takes less than a second; others may take some of it meanwhile.
        with suppress(OSError):
            free_bytes = max(1, space.f_bavail * space.f_frsize * 9 // 10)
            os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free_bytes)
        while True:
            file.write(bytes(space.f_frsize))
    return filler
