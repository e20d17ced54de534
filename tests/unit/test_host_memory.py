"""Freed memory stays in the process: the kernel clears no page twice. Page faults and sizes are counted."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from dit_scale import host_memory

NUM_BYTES = 33 * 2**20
"""More than 32 MiB: smaller blocks may be reused by default."""
WARM_UP, ROUNDS = 30, 3
"""The heap grows in the first rounds, until its free blocks suffice."""
PAGE = 4096
PAGES = ROUNDS * 2 * NUM_BYTES // PAGE
COUNTER_BYTES = 2**22
"""Far more than what the kernel's counters of a process lag behind."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CHILD = f"""
import resource
from dit_scale import dist, host_memory
{{calls}}
import torch

def touch():
    first = torch.ones({NUM_BYTES}, dtype=torch.uint8)
    second = torch.ones({NUM_BYTES}, dtype=torch.uint8)

for _ in range({WARM_UP}):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)


def faults_of(calls: str) -> int:
    """Page faults of ROUNDS rounds that touch two blocks and free them."""
    command = [sys.executable, "-c", CHILD.format(calls=calls)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_used_again() -> None:
    plain, reused = faults_of(""), faults_of("dist.compute_on_cpu(1)")
    print(f"page faults: {plain} by default, {reused} with reuse, for {PAGES} pages")
    assert plain > PAGES // 2
    assert reused < PAGES // 4


def test_tensors_are_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text():
        pytest.skip("transparent huge pages on request: the kernel always or never gives them")
    plain, huge = faults_of(""), faults_of("host_memory.use_huge_pages()")
    print(f"page faults: {plain} by default, {huge} in huge pages, for {PAGES} pages")
    assert huge < plain // 4
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert faults_of("host_memory.use_huge_pages()") > plain // 2, "the environment decides"


def test_resident_memory_counts_what_is_touched_and_remembers_its_peak() -> None:
    before, peak_before = host_memory.resident()
    block = mmap.mmap(-1, NUM_BYTES)
    block.write(b"x" * NUM_BYTES)
    during, peak = host_memory.resident()
    block.close()
    after, peak_after = host_memory.resident()
    assert during - before > NUM_BYTES - COUNTER_BYTES
    assert during - after > NUM_BYTES - COUNTER_BYTES
    assert before <= peak_before + COUNTER_BYTES
    assert peak > during - COUNTER_BYTES
    assert peak_after > peak - COUNTER_BYTES
