"""One run that is started, killed at a random moment, and started again, as often as asked.

A kill is a SIGKILL to one rank or to its writer and, some time later, to the other ranks, as a launcher would
do. The victim and all writers are stopped first, and their stacks are read.
"""

import os
import queue
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from dit_scale.config import TrainConfig
from dit_scale.signals import REQUEUE_EXIT_CODE
from tests.chaos.stacks import (
    AT_WORK,
    IN_SAVE,
    RANK_SECTIONS,
    WRITER_SECTIONS,
    read_stacks,
    section_of,
)
from tests.support.ranks import jobs, record
from tests.support.ranks.processes import start
from tests.support.ranks.runs import kill

WORLD = 2
POLL_S = 0.002
START_LIMIT_S = 120.0
STEP_LIMIT_S = 5.0
"""Far more than a start or a step takes; a slower process hangs."""
MAX_NEW_STEPS = 10
MAX_DELAY_S = 0.5
BURST_S = 0.03
"""A writer that is caught working continues for about this long."""

Aim = Literal["anywhere", "save", "stop", "start"]
AIMS: dict[Aim, float] = {"anywhere": 0.5, "save": 0.3, "stop": 0.1, "start": 0.1}
"""How a moment is chosen, and how often.

    anywhere: some new steps after the resume, and a part of a step
    save: the same, then until a writer is working, and a few milliseconds
    stop: the same, then SIGTERM to one rank, and a part of the last save
    start: a part of the start; such a kill is extra and does not count
"""


class RunError(Exception):
    """The run did something that it should not do."""


@dataclass(frozen=True)
class Plan:
    """The random choices of a cycle, made before it starts."""

    aim: Aim
    new_steps: int
    part: float
    rank: int
    writer: bool
    delay_s: float
    """From the kill of the victim to the kill of the others."""


@dataclass(frozen=True)
class Kill:
    """The result of a cycle."""

    aim: Aim
    victim: str
    section: str
    """Where the victim was."""
    writers: tuple[str, ...]
    """Where the writer of each rank was."""
    resumed_step: int
    step: int
    """The newest step in the record."""
    delay_s: float
    cycle_s: float

    @property
    def counts(self) -> bool:
        return self.aim != "start"

    @property
    def in_save(self) -> bool:
        """Whether the kill interrupted a snapshot, a working writer, or the wait for the last save."""
        return self.section in IN_SAVE or not AT_WORK.isdisjoint(self.writers)


def draw(draws: random.Random) -> Plan:
    return Plan(
        aim=draws.choices(list(AIMS), list(AIMS.values()))[0],
        new_steps=draws.randint(1, MAX_NEW_STEPS),
        part=draws.random(),
        rank=draws.randrange(WORLD),
        writer=draws.random() < 1 / 3,
        delay_s=draws.choice((0.0, draws.uniform(0, MAX_DELAY_S))),
    )


def train(config: TrainConfig, output: Path) -> int:
    """Run one rank; its output is appended to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    return jobs.train(config)


def undisturbed(config: TrainConfig, output: Path) -> None:
    """Run to the last step. Raise RunError when a rank fails."""
    with _ranks(config, output) as (ranks, answers):
        for _ in ranks:
            try:
                rank, error, result = answers.get(timeout=START_LIMIT_S + STEP_LIMIT_S * config.steps)
            except queue.Empty:
                raise RunError("the undisturbed run hangs") from None
            if error or result:
                raise RunError(f"rank {rank} ended with {result}:\n{error}")


class Hunt:
    """A run and its kills so far."""

    def __init__(self, config: TrainConfig, output: Path) -> None:
        self.config, self._output = config, output
        self._journal = record.Journal(Path(config.run) / "events.jsonl")
        self._metrics = Path(config.run) / "metrics.jsonl"
        self._starts_s = [3.0]

    def cycle(self, plan: Plan) -> Kill | None:
        """Start the run and kill it. Return None when it ended first, as requested.

        Raise RunError when the run fails on its own, hangs, or leaves a writer running.
        """
        begin_s = time.monotonic()
        attempts, resumed_step = self._journal.follow().attempts, -1
        with _ranks(self.config, self._output) as (ranks, answers):
            if plan.aim == "start":
                time.sleep(plan.part * 1.2 * median(self._starts_s))
            else:
                resumed_step = self._wait_for_moment(plan, attempts, ranks, answers)
            _check_answers(answers)
            blow = _strike(plan, [process.pid for process in ranks])
            if blow is None:
                _check_answers(answers)
                return None
            time.sleep(plan.delay_s)
        _check_gone(blow.writers)
        return Kill(
            aim=plan.aim,
            victim=blow.victim,
            section=blow.section,
            writers=tuple(blow.writers.values()),
            resumed_step=resumed_step,
            step=record.last_step(self._metrics),
            delay_s=round(plan.delay_s, 3),
            cycle_s=round(time.monotonic() - begin_s, 3),
        )

    def _wait_for_moment(self, plan: Plan, attempts: int, ranks: list[Any], answers: Any) -> int:
        """Wait for the chosen moment; return the step from which the run resumed."""
        begin_s, journal = time.monotonic(), self._journal
        _wait(lambda: journal.follow().attempts > attempts, ranks, answers, START_LIMIT_S)
        resumed_step = journal.resumed_step
        self._starts_s.append(time.monotonic() - begin_s)
        goal = resumed_step + plan.new_steps
        first_s = time.monotonic()
        limit_s = STEP_LIMIT_S * MAX_NEW_STEPS
        _wait(lambda: record.last_step(self._metrics) >= goal, ranks, answers, limit_s)
        step_s = (time.monotonic() - first_s) / plan.new_steps
        if plan.aim == "save":
            writers = [writer for process in ranks for writer in _writers(process.pid)]
            _wait(lambda: any(_state(writer) in "RD" for writer in writers), ranks, answers, limit_s)
            time.sleep(plan.part * BURST_S)
        elif plan.aim == "stop":
            _send(ranks[plan.rank].pid, signal.SIGTERM)
            # The current step comes first. A save is faster while no rank trains.
            time.sleep(plan.part * (step_s + median(journal.follow().saves_s or [step_s]) / 3))
        else:
            time.sleep(plan.part * step_s)
        return resumed_step


@contextmanager
def _ranks(config: TrainConfig, output: Path) -> Iterator[tuple[list[Any], Any]]:
    """Yield the ranks of a run and the queue of their answers; kill the ranks at the end of the block."""
    ranks, answers = start(WORLD, train, config, output)
    try:
        yield ranks, answers
    finally:
        kill(ranks)
        answers.close()


def _wait(done: Callable[[], bool], ranks: list[Any], answers: Any, limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    while not done():
        if not all(process.is_alive() for process in ranks):
            _check_answers(answers)
            raise RunError("a rank exited on its own")
        if time.monotonic() > end_s:
            raise RunError(f"no progress within {limit_s:g} s")
        time.sleep(POLL_S)


@dataclass(frozen=True)
class Blow:
    """A kill at the moment when it is delivered."""

    victim: str
    section: str
    writers: dict[int, str]
    """Process id => section."""


def _strike(plan: Plan, ranks: list[int]) -> Blow | None:
    """Kill the victim where it is; return None when it has already exited.

    A rank that has no writer yet is killed instead of its writer.
    """
    writer_of = {rank: _writers(rank) for rank in ranks}
    writers = [writer for found in writer_of.values() for writer in found]
    name, victim = f"rank {plan.rank}", ranks[plan.rank]
    if plan.writer and writer_of[victim]:
        name, victim = f"writer of {name}", writer_of[victim][0]
    stopped = {victim, *writers}
    for process_id in stopped:
        _send(process_id, signal.SIGSTOP)
    if _state(victim) in "XZ":
        return None
    stacks = read_stacks(stopped)
    _send(victim, signal.SIGKILL)
    for process_id in stopped:
        _send(process_id, signal.SIGCONT)
    found = {writer: section_of(stacks[writer], WRITER_SECTIONS) for writer in writers}
    section = f"writer: {found[victim]}" if victim in found else section_of(stacks[victim], RANK_SECTIONS)
    return Blow(name, section, found)


def _send(process_id: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, number)


def _writers(rank: int) -> list[int]:
    """Return the ids of a rank's writer processes: one, or none during the start."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
        for child in children:
            if b"dit_scale.checkpoint.writer" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def _check_gone(writers: dict[int, str]) -> None:
    """Raise RunError when a writer outlives its rank."""
    end_s = time.monotonic() + STEP_LIMIT_S
    while left := [writer for writer in writers if _state(writer) not in "XZ"]:
        if time.monotonic() > end_s:
            raise RunError(f"writers {left} are still running after their ranks exited")
        time.sleep(POLL_S)


def _state(process_id: int) -> str:
    """Return the state letter of proc(5): R runs, D waits for a disk, Z is a zombie, X is dead."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


def _check_answers(answers: Any) -> None:
    """Raise RunError when a rank ended for any reason other than the requested stop."""
    while not answers.empty():
        rank, error, result = answers.get()
        if error or result != REQUEUE_EXIT_CODE:
            raise RunError(f"rank {rank} ended with {result}:\n{error}")
