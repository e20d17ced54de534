"""How a process gets memory from the kernel. On a CPU, this decides a tenth to a third of a model's speed.

A pass of a model allocates and frees the same megabytes again and again. By default, libc returns them to the
kernel each time, which then clears every page of 4 KiB that is touched anew. `reuse` keeps freed memory in
the process; `use_huge_pages` maps 2 MiB at a time. Neither changes a bit of any result.
"""

import ctypes
import os
import re
from pathlib import Path

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
LARGEST_REUSED_BYTES = 2**30
"""Larger blocks are still returned when they are freed: they are few, and expensive to keep."""


def reuse() -> None:
    """Keep freed memory in this process for its next allocations. Without glibc, nothing changes.

    The resident memory of the process then stays near its peak; blocks of different sizes may raise the peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGEST_REUSED_BYTES)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def use_huge_pages() -> None:
    """Let torch ask for huge pages for its tensors on the CPU, unless the environment already decides.

    Call this before the first tensor is made: torch reads the variable once. Where the kernel has no huge
    pages to give, nothing changes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def resident() -> tuple[int, int]:
    """Bytes of memory that this process has now, and the most that it has had since it started."""
    status = Path("/proc/self/status").read_text()
    now, peak = (int(re.search(rf"^{name}:\s+(\d+) kB$", status, re.M)[1]) for name in ("VmRSS", "VmHWM"))  # type: ignore[index]
    return 1024 * now, 1024 * peak
