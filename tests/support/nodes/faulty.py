"""A node with a faulty rank, instead of `dit_scale.cli`:

    python -m tests.support.nodes.faulty launch CONFIG ...

FAULT=<kind>:<rank> names a fault of FAULTS and the rank that suffers it. Launcher, ranks and supervisor are
the real ones, except for the deadlines of a step and of the sum over the devices. `slow` makes all ranks slow
now and then, which is no fault. `impatient` ranks do not wait long for the node of rank 0.
"""

import ctypes
import itertools
import os
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from dit_scale import cli
from dit_scale.elastic import launch as run
from dit_scale.elastic.node import collective
from dit_scale.elastic.node import rank as supervision
from tests.support.speed import scaled

VARIABLE = "FAULT"
SHORTEST_S = 5.0
"""Shortest deadline of a step, before `scaled`."""
CALLS = 45
"""The call that fails. With two micro-batches per step it follows the first 99th percentile (step 17)."""
_ATTACH_FILTER = 26


def lock() -> None:
    """Wait for a lock that another thread never releases."""
    taken, held = threading.Event(), threading.Lock()

    def hold() -> None:
        with held:
            taken.set()
            threading.Event().wait()

    threading.Thread(target=hold, name="holder", daemon=True).start()
    taken.wait()
    with held:
        raise AssertionError("the lock was released")


def deaf() -> None:
    """Make the kernel silently drop everything that other ranks send to this one."""
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("@HP", 1, ctypes.addressof(drop))
    for name in os.listdir("/proc/self/fd"):
        try:
            peer = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # no socket, or closed since
            continue
        with peer:
            if peer.family in (socket.AF_INET, socket.AF_INET6):
                peer.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)


def stuck_read() -> None:
    """Read from a pipe into which nothing is written."""
    os.read(os.pipe()[0], 1)


def frozen_read() -> None:
    """Hang in a read with the interpreter lock held, as for a page of a mapped file that never arrives."""
    main = threading.main_thread().ident
    while not _is_in(main, "loader.py", "__next__"):
        time.sleep(0.01)
    ctypes.PyDLL(None).sleep(1000)


def _is_in(thread: int | None, file: str, function: str) -> bool:
    frame = sys._current_frames()[thread or 0]
    while frame is not None:
        if frame.f_code.co_filename.endswith(file) and frame.f_code.co_name == function:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def at(owner: str, name: str, fault: Callable[[], None]) -> None:
    """Make this process suffer a fault at one call of a function."""
    place: Any = _find(owner)
    real, calls = getattr(place, name), itertools.count(1)

    def wrapper(*args: Any, **more: Any) -> Any:
        if next(calls) == CALLS:
            fault()
        return real(*args, **more)

    setattr(place, name, wrapper)


def _find(owner: str) -> Any:
    module, _, cls = owner.partition(":")
    __import__(module)
    return getattr(sys.modules[module], cls) if cls else sys.modules[module]


FAULTS = {
    "lock": ("dit_scale.train.trainer", "losses", lock),
    "deaf": ("dit_scale.train.trainer", "losses", deaf),
    "stuck_read": ("dit_scale.data.shards:LatentDataset", "read_views", stuck_read),
    "frozen_read": ("dit_scale.data.shards:LatentDataset", "read_views", frozen_read),
}
"""Kind => owner and name of the function, and the fault."""

SLOW = {
    "step": ("dit_scale.train.trainer:Trainer", "accumulate", 1 / 1000, (1.0, 6.0)),
    "read": ("dit_scale.data.shards:LatentDataset", "read_views", 1 / 3000, (9.0, 15.0)),
    "log": ("dit_scale.train.attempt:Attempt", "log", 1 / 50, (1.0, 6.0)),
    "snapshot": ("dit_scale.checkpoint.saver:Snapshot", "take", 1 / 3, (1.0, 6.0)),
}
"""Kind => owner and name of the function, the share of its calls that are slow, their duration in seconds."""


def slow(kind: str, seed: int) -> None:
    """Make calls of a function slow now and then, and print each."""
    owner, name, share, (least_s, most_s) = SLOW[kind]
    place, draws = _find(owner), random.Random(f"{kind} {seed}")
    real = getattr(place, name)

    def wrapper(*args: Any, **more: Any) -> Any:
        if draws.random() < share:
            wait_s = draws.uniform(least_s, most_s)
            print(f"slow {kind} {wait_s:.1f}", flush=True)
            time.sleep(wait_s)
        return real(*args, **more)

    setattr(place, name, wrapper)


def main() -> int:
    run.MODULE = "tests.support.nodes.faulty"
    kind, _, victim = os.environ[VARIABLE].partition(":")
    rank = os.environ.get("RANK")
    if kind == "impatient":
        supervision.reach = partial(supervision.reach, within_s=2.0)
    elif rank is not None and kind == "slow":
        from dit_scale.checkpoint import saver

        saver.WRITER = (sys.executable, "-m", "tests.support.nodes.slow_writer")
        for name in SLOW:
            slow(name, int(rank))
    elif rank is None and kind in FAULTS:
        collective.COLLECTIVE_S = scaled(collective.COLLECTIVE_S)
        run.Deadlines = partial(run.Deadlines, shortest_s=scaled(SHORTEST_S))  # type: ignore[misc, assignment]
    elif rank == victim:
        at(*FAULTS[kind])
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
