"""Disturbances of a run from outside: kills, a full disk, a flipped bit, a stale process that resumes.

Each function takes a run that has not started, disturbs it at random moments, and runs it to its last step.
The return value reports what happened; the campaign checks the results.
"""

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dit_scale.elastic.node.exits import Exit
from dit_scale.signals import REQUEUE_EXIT_CODE
from tests.support.ranks.public_run import Form, PublicRun, RunError, Started, wait_until

MAX_KILLS = 3
MAX_DELAY_S = 1.0
"""From a commit to the disturbance: some steps, or a part of the next save."""
MAX_OPENING_S = 0.05
"""From the claim of an attempt to the disturbance, while the attempt opens its files."""
MAX_START_S = 6.0
"""About as long as a start takes."""
MAX_FULL_S = 8.0
MAX_TRIES = 6
"""Starts after which an undisturbed run must have finished."""

OF_DATA = "data"
"""The name of the data set's folder, next to the run folder."""


@dataclass(frozen=True)
class Happened:
    """What happened to a run, and how it ended."""

    what: str
    outcome: str
    changed: Path | None = None
    """A file that stayed damaged."""


Disturb = Callable[[PublicRun, random.Random], Happened]


def kills(run: PublicRun, draws: random.Random) -> Happened:
    """SIGKILL one process of a run, right after a commit or anywhere, up to MAX_KILLS times."""
    form: Form = draws.choice(("launch", "ranks"))
    victims = []
    started = run.start(form)
    for _ in range(draws.randint(1, MAX_KILLS)):
        if not _pass_time(run, started, draws):
            break
        family = started.family()
        if not family:
            break
        role = draws.choice(sorted(set(family.values()) - {"other"}) or ["other"])
        victim = draws.choice(sorted(pid for pid, its in family.items() if its == role))
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        victims.append(role)
        if form == "ranks":  # there is no supervisor: a scheduler kills the others after some time
            time.sleep(draws.uniform(0, MAX_DELAY_S))
            if started.is_over() and not any(started.wait()):
                break
            started.kill()
            started = run.start(form)
        elif role == "supervisor":
            started.processes[0].wait()
            started = run.start(form)
    return Happened(f"{form}: killed {', '.join(victims) or 'no process'}", _to_the_end(run, started, form))


def full_disk(run: PublicRun, draws: random.Random) -> Happened:
    """Fill the file system of the run for a while, up to MAX_KILLS times."""
    form: Form = draws.choice(("launch", "ranks"))
    times = 0
    started = run.start(form)
    for _ in range(draws.randint(1, MAX_KILLS)):
        if not _pass_time(run, started, draws):
            break
        with _filled(run.folder.parent / "filler"):
            time.sleep(draws.uniform(0.2, MAX_FULL_S))
        times += 1
    return Happened(f"{form}: disk full {times} times", _to_the_end(run, started, form))


def flipped_bit(run: PublicRun, draws: random.Random) -> Happened:
    """Stop the run, flip one bit in one of its files or in its data set, and resume.

    A refusal must name the damaged file; then the bit is flipped back.
    """
    form: Form = draws.choice(("launch", "ranks"))
    started = run.start(form)
    if wait_until(lambda: run.commits() >= draws.randint(1, 4), started):
        started.processes[0].send_signal(signal.SIGTERM)
    if (codes := started.wait()) not in ([REQUEUE_EXIT_CODE] * len(codes), [0] * len(codes)):
        raise RunError(f"the run was asked to stop and exited with {codes}:\n{started.text()[-3000:]}")
    folders = _files(run)
    kind, path = draws.choice(sorted(folders[draws.choice(sorted(folders))].items()))
    place = draws.randrange(path.stat().st_size * 8)
    _flip(path, place)
    started = run.start(form)
    codes = started.wait()
    if not any(codes):
        return Happened(f"bit {place} of {kind}", "ended in spite of it", path)
    said = _refusal(started)
    _flip(path, place)
    outcome = _to_the_end(run, run.start(form), form)
    return Happened(f"bit {place} of {kind}", f"refused: {said}; flipped back: {outcome}")


def woken_up(run: PublicRun, draws: random.Random) -> Happened:
    """Stop all processes of a start at a random point, start the run again, and resume the stopped ones."""
    stale = run.start("ranks")
    _pass_time(run, stale, draws)
    stale.send(signal.SIGSTOP)
    begun = run.commits()
    started = run.start("ranks")
    wait_until(lambda: run.commits() > begun + draws.randint(0, 2), started)
    time.sleep(draws.uniform(0, MAX_DELAY_S))
    stale.send(signal.SIGCONT)
    live = started.wait()
    old = stale.wait()
    outcome = _to_the_end(run, started, "ranks")
    return Happened("stale processes woken up", f"they ended with {old}, the later ones {live}; {outcome}")


def _pass_time(run: PublicRun, started: Started, draws: random.Random) -> bool:
    """Wait for a random moment. Return False when the start ended earlier.

    Half of the moments follow a commit, a quarter follow the claim of an attempt, the others are anywhere.
    """
    aim = draws.random()
    if aim < 0.5:
        commits = run.commits() + draws.randint(1, 4)
        if not wait_until(lambda: run.commits() >= commits, started):
            return False
        rest_s = draws.choice((0.0, draws.uniform(0, MAX_DELAY_S)))
    elif aim < 0.75:
        attempts = len(_attempts(run))
        if not wait_until(lambda: len(_attempts(run)) > attempts, started):
            return False
        rest_s = draws.uniform(0, MAX_OPENING_S)
    else:
        rest_s = draws.uniform(0, 2 * MAX_START_S)
    end_s = time.monotonic() + rest_s
    return wait_until(lambda: time.monotonic() >= end_s, started)


def _attempts(run: PublicRun) -> list[Path]:
    return [*run.folder.glob("attempts/*.json")]


def _to_the_end(run: PublicRun, started: Started, form: Form) -> str:
    """Run to the last step with as many starts as a scheduler would allow; return their number."""
    for tries in range(MAX_TRIES):
        codes = started.wait()
        if not any(codes):
            return f"done after {tries} further starts" if tries else "done"
        if Exit.DO_NOT_RESTART in codes and form == "launch":
            raise RunError(f"the run gave up and exited with {codes}:\n{started.text()[-3000:]}")
        started = run.start(form)
    raise RunError(f"the run has not finished after {MAX_TRIES} starts:\n{started.text()[-3000:]}")


@contextmanager
def _filled(filler: Path) -> Iterator[None]:
    """Fill the file system of this file to the last byte."""
    with filler.open("wb", buffering=0) as file:
        size = 2**20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    try:
        yield
    finally:
        filler.unlink()


def _files(run: PublicRun) -> dict[str, dict[str, Path]]:
    """Top-level folder or file => kind of file => the newest file of that kind.

    Drawing in this order, the many small files of one folder do not hide the few important ones.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(run.folder.parent.rglob("*")):
        name = path.relative_to(run.folder.parent).as_posix()
        if path.is_file() and path.stat().st_size and "/" in name:
            kind = re.sub(r"\d+", "#", name)
            found.setdefault("/".join(name.split("/")[:2]), {})[kind] = path
    return found


def _flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def _refusal(started: Started) -> str:
    """Return the error message of a start. Raise RunError if there is none or a traceback."""
    text = started.text()
    lines = [line for line in text.splitlines() if line.startswith(("dit-scale", "[one]"))]
    if "Traceback" in text or not lines:
        raise RunError(f"the run exited without a message or with a traceback:\n{text[-3000:]}")
    return lines[-1][:200]


DISTURBANCES: dict[str, Disturb] = {
    "kills": kills,
    "full disk": full_disk,
    "flipped bit": flipped_bit,
    "stale process": woken_up,
}
