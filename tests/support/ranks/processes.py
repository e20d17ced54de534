"""Real processes for tests, forked from a server that has loaded torch and DeepSpeed, so starts are cheap.

    losses = run(3, job, config)            # job(config) in three ranks; its return values by rank

A job sees RANK, WORLD_SIZE and a fresh MASTER_PORT, as under a launcher. When a run fails or times out, the
remaining processes are killed by their process ids.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from tests.support.faults.ports import free_port
from tests.support.speed import scaled

TIMEOUT_S = scaled(400.0)
"""Far more than any job takes; a slower process hangs."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.ranks.preload"])


def start(world: int, job: Callable[..., Any], *args: Any) -> tuple[list[Any], Any]:
    """Start `job(*args)` in every rank; return the processes and the queue of (rank, error, result)."""
    answers = _context.Queue()
    port = free_port()
    ranks = [
        _context.Process(target=_rank, args=(rank, world, port, answers, job, args), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks, answers


def run(world: int, job: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Return the results of `job(*args)` by rank; raise with the traceback of the first rank that fails."""
    ranks, answers = start(world, job, *args)
    results: dict[int, Any] = {}
    try:
        while len(results) < world:
            rank, error, result = answers.get(timeout=timeout_s)
            if error:
                raise AssertionError(f"rank {rank} of {world} failed:\n{error}")
            results[rank] = result
    finally:
        for process in ranks:
            process.join(timeout=5 if len(results) == world else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world)]


def _rank(rank: int, world: int, port: int, answers: Any, job: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        answers.put((rank, None, job(*args)))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
