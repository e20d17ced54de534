"""Read from outside, with py-spy, which section of the code a process is in.

The process is stopped with SIGSTOP while its stack is read, and takes no part in the reading.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

PY_SPY = Path(sys.executable).with_name("py-spy")

Stack = tuple[str, ...]
"""`file:function` of every frame of a main thread, innermost first."""

RANK_SECTIONS = (
    ("snapshot", "dit_scale/checkpoint/saver.py:take"),
    ("waiting for the last save", "dit_scale/checkpoint/saver.py:wait"),
    ("starting a save", "dit_scale/train/saving.py:_start"),
    ("following a save", "dit_scale/train/saving.py:follow"),
    ("log", "dit_scale/train/attempt.py:log"),
    ("data wait", "dit_scale/data/loader.py:__next__"),
    ("forward", "dit_scale/train/objective.py:losses"),
    ("reduce", "dit_scale/train/engine.py:backward", "torch/distributed/distributed_c10d.py:"),
    ("backward", "dit_scale/train/engine.py:backward"),
    ("sum of the losses", "dit_scale/dist.py:sum"),
    ("optimizer", "dit_scale/train/engine.py:step"),
    ("EMA", "dit_scale/train/ema.py:update"),
    ("vote", "dit_scale/dist.py:start_vote"),
    ("vote", "dit_scale/dist.py:result"),
    ("vote", "dit_scale/checkpoint/saver.py:flags"),
    ("restore", "dit_scale/train/restore.py:find_checkpoint"),
    ("restore", "dit_scale/train/restore.py:restore"),
    ("start", "dit_scale/train/session.py:__init__"),
    ("start", "dit_scale/train/attempt.py:__init__"),
    ("start", "dit_scale/dist.py:start"),
    ("start", "dit_scale/train/determinism.py:pin"),
    ("closing", "dit_scale/data/loader.py:close"),
    ("closing", "dit_scale/checkpoint/saver.py:close"),
    ("closing", "dit_scale/dist.py:stop"),
    ("between these", "dit_scale/train/loop.py:train"),
    ("start", "tests/support/ranks/processes.py:_rank"),
    ("start", "multiprocessing/forkserver.py:"),
)
"""Section => the frames that a rank has on its stack there. The first match counts.

`file:` stands for any function of the file.
"""

WRITER_SECTIONS = (
    ("retention", "dit_scale/checkpoint/retention.py:prune"),
    ("committing", "dit_scale/checkpoint/writer.py:commit"),
    ("reading again", "dit_scale/checkpoint/rankfile.py:verify"),
    ("writing", "dit_scale/checkpoint/writer.py:write"),
    ("idle", "dit_scale/checkpoint/writer.py:serve"),
    ("starting", ""),
)
"""The same for a writer."""

UNKNOWN = "unknown"
"""The section of a stack that could not be read."""
SECTIONS = (
    *dict.fromkeys(section for section, *_ in RANK_SECTIONS),
    *(f"writer: {section}" for section, *_ in WRITER_SECTIONS),
    UNKNOWN,
    f"writer: {UNKNOWN}",
)
"""All sections that a victim can be in."""
AT_WORK = {"retention", "committing", "reading again", "writing"}
"""Sections of a writer that are part of a save."""
IN_SAVE = {"snapshot", "waiting for the last save"}
"""Sections of a rank that are part of a save."""


def section_of(stack: Stack, sections: Iterable[tuple[str, ...]]) -> str:
    """Return the first section whose frames are all on the stack."""
    for section, *frames in sections:
        if stack and all(any(_is_at(place, frame) for place in stack) for frame in frames):
            return section
    return UNKNOWN


def read_stacks(process_ids: Iterable[int]) -> dict[int, Stack]:
    """Return the stack of the main thread of each process; empty where py-spy could not read it."""
    readers = {
        number: subprocess.Popen(_dump(number), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for number in process_ids
    }
    return {number: _main_thread(number, reader.communicate()[0]) for number, reader in readers.items()}


def why_not() -> str:
    """Return why stacks cannot be read here; empty when they can."""
    if not PY_SPY.exists():
        return f"no py-spy next to {sys.executable}: pip install py-spy"
    tried = subprocess.run(_dump(os.getpid()), capture_output=True, text=True)
    if tried.returncode:
        return f"py-spy may not read another process (root may, and CAP_SYS_PTRACE): {tried.stderr}"
    return ""


def _is_at(place: str, frame: str) -> bool:
    return place.endswith(frame) or (frame.endswith(":") and frame in place)


def _dump(process_id: int) -> list[str]:
    # py-spy would stop the process itself, and it fails on a process that is stopped already.
    return [str(PY_SPY), "dump", "--nonblocking", "--json", "--full-filenames", "--pid", str(process_id)]


def _main_thread(process_id: int, dump: bytes) -> Stack:
    for thread in json.loads(dump or "[]"):
        if thread["os_thread_id"] == process_id:
            return tuple(f"{frame['filename']}:{_plain(frame['name'])}" for frame in thread["frames"])
    return ()


def _plain(name: str) -> str:
    """Return the name without the surrounding class or function."""
    return name.rpartition(".")[2]
