"""What befalls a run from outside: kills, a full disk, a flipped bit, a stopped process that wakes up.

Each takes a run that has not begun, disturbs it at moments that are drawn, and brings it to its end. What it
returns says what happened; that the results are right is for the campaign to compare.
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
"""Between a commit and what befalls the run: some steps, or a part of the next save."""
MAX_OPENING_S = 0.05
"""Between the claim of an attempt and what befalls it while it opens its files."""
MAX_START_S = 6.0
"""A start takes about as long."""
MAX_FULL_S = 8.0
MAX_TRIES = 6
"""Starts after which a run that meets no further disturbance must have ended."""

OF_DATA = "data"
"""The name of the data set's folder, beside the run's."""


@dataclass(frozen=True)
class Happened:
    """What befell a run, and what it came to."""

    what: str
    outcome: str
    changed: Path | None = None
    """A file that was left damaged."""


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
        if form == "ranks":  # no supervisor: a scheduler ends the others, some time later
            time.sleep(draws.uniform(0, MAX_DELAY_S))
            if started.is_over() and not any(started.wait()):
                break
            started.kill()
            started = run.start(form)
        elif role == "supervisor":
            started.processes[0].wait()
            started = run.start(form)
    return Happened(f"{form}: killed {', '.join(victims) or 'nobody'}", _to_the_end(run, started, form))


def full_disk(run: PublicRun, draws: random.Random) -> Happened:
    """Fill up the file system of the run for a while, up to MAX_KILLS times."""
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
    """Stop the run, flip one bit of one of its files or of its data set, and go on.

    A refusal must name what is wrong; then the bit is flipped back.
    """
    form: Form = draws.choice(("launch", "ranks"))
    started = run.start(form)
    if wait_until(lambda: run.commits() >= draws.randint(1, 4), started):
        started.processes[0].send_signal(signal.SIGTERM)
    if (codes := started.wait()) not in ([REQUEUE_EXIT_CODE] * len(codes), [0] * len(codes)):
        raise RunError(f"stopped on request, it ended with {codes}:\n{started.text()[-3000:]}")
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
    """Stop all processes of a start at a random point, start the run again, and wake the first ones up."""
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
    """Wait for a moment that is drawn; False when the start ended before.

    Half of them lie just behind a commit, a quarter just behind the claim of an attempt, the others anywhere.
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
    """Bring the run to its end, with as many starts as a scheduler would allow; says how many it took."""
    for tries in range(MAX_TRIES):
        codes = started.wait()
        if not any(codes):
            return f"done after {tries} further starts" if tries else "done"
        if Exit.DO_NOT_RESTART in codes and form == "launch":
            raise RunError(f"gave up, with {codes}:\n{started.text()[-3000:]}")
        started = run.start(form)
    raise RunError(f"not done after {MAX_TRIES} starts:\n{started.text()[-3000:]}")


@contextmanager
def _filled(filler: Path) -> Iterator[None]:
    """No room is left on the file system of this file, to the last byte."""
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
    """Folder or file at the top => kind of file in it => the last of that kind.

    Drawn in this order, the many small files of one folder do not hide the few that matter.
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
    """The message with which it ended: RunError where there is none, or a traceback."""
    text = started.text()
    lines = [line for line in text.splitlines() if line.startswith(("dit-scale", "[one]"))]
    if "Traceback" in text or not lines:
        raise RunError(f"ended without a message, or with a traceback:\n{text[-3000:]}")
    return lines[-1][:200]


DISTURBANCES: dict[str, Disturb] = {
    "kills": kills,
    "full disk": full_disk,
    "flipped bit": flipped_bit,
    "stale process": woken_up,
}
