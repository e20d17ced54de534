"""Processes that hold one loop each and take turns: only the process whose turn it is computes.

with loops(["bare", "zero1"], setting, processes=[1]) as started:
    slices = measure(started, warmup=3, rounds=7, steps=2)
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from benchmarks.peers.loops import Setting, build_step
from benchmarks.step_parts import free_port
from dit_scale import dist

SPAWN = multiprocessing.get_context("spawn")


class Slice(NamedTuple):
    """Seconds per step of a loop in one turn."""

    wall_s: float
    cpu_s: float
    """CPU time of the process, all threads. Other programs on the machine affect it little."""


class Loop:
    """A loop in its own processes: one, or several ranks of a run."""

    def __init__(self, name: str, setting: Setting, num_processes: int = 1) -> None:
        self.name, self.setting, self.num_processes = name, setting, num_processes
        self.problem = ""
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_processes):
            pipe, theirs = SPAWN.Pipe()
            environment = {} if num_processes == 1 else _launched(rank, num_processes, port)
            process = SPAWN.Process(target=_serve, args=(theirs, name, setting, environment), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def take(self, steps: int) -> Slice | None:
        """Take steps; None, with `problem` set, when a process cannot."""
        if self.problem:
            return None
        answers: list[Any] = []
        try:
            for pipe in self._pipes:
                pipe.send(steps)
            answers = [pipe.recv() for pipe in self._pipes]
        except (EOFError, BrokenPipeError):
            answers.append("a process was killed, possibly because memory ran out")
        problems = [answer for answer in answers if isinstance(answer, str)]
        if problems:
            self.problem = problems[0]
            self.close()
            return None
        return Slice(*(max(column) for column in zip(*answers, strict=True)))

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


@contextmanager
def loops(names: list[str], setting: Setting, processes: list[int]) -> Iterator[list[Loop]]:
    """Start all loops, one after the other; only ours run on several processes."""
    started: list[Loop] = []
    try:
        for number in processes:
            started += [
                Loop(name, setting, number) for name in names if number == 1 or name.startswith("zero")
            ]
        yield started
    finally:
        for loop in started:
            loop.close()


def measure(started: list[Loop], *, warmup: int, rounds: int, steps: int) -> list[tuple[Loop, list[Slice]]]:
    """Let the loops take turns: `rounds` turns of `steps` steps each, after a turn of warm-up.

    Returns each loop with its slices; there are none for a loop with a problem.
    """
    for loop in started:
        loop.take(warmup)
    slices: list[list[Slice]] = [[] for _ in started]
    for _ in range(rounds):
        for loop, taken in zip(started, slices, strict=True):
            if (one := loop.take(steps)) is not None:
                taken.append(one)
    return [(loop, [] if loop.problem else taken) for loop, taken in zip(started, slices, strict=True)]


def _launched(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that a launcher sets."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _serve(pipe: Connection, name: str, setting: Setting, environment: dict[str, str]) -> None:
    """Run as many steps as each message says, and answer with a slice, or with what went wrong."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print to it; rows need it
    os.environ.update(environment)
    on_cuda = setting.device == "cuda"
    try:
        steps = pipe.recv()
        step = build_step(name, setting)
        while True:
            started = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
            if on_cuda:
                torch.cuda.synchronize()
            ended = time.perf_counter(), time.process_time()
            pipe.send(Slice(*((b - a) / steps for a, b in zip(started, ended, strict=True))))
            steps = pipe.recv()
    except EOFError:  # the parent is gone
        return
    except Exception as error:  # any failure of this loop must not abort the others
        pipe.send("".join(traceback.format_exception_only(error)).splitlines()[0])
    finally:
        dist.stop()
