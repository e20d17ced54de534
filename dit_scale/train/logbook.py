"""What rank 0 writes down of an attempt: journal, record and mirrors, none of which can stop the run."""

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig, dump
from dit_scale.errors import StorageError
from dit_scale.journal import Event, Journal
from dit_scale.lines import Say
from dit_scale.storage import DiskFullError, MissingKeyError, Storage, open_storage
from dit_scale.telemetry import record
from dit_scale.telemetry.record import Record
from dit_scale.telemetry.sinks import open_mirrors
from dit_scale.train.run_folder import EVENTS, METRICS


@dataclass(frozen=True)
class Carried:
    """What an attempt goes on from."""

    rows: Sequence[str] = ()
    """Lines of the record, of the steps that count."""
    events: Sequence[str] = ()
    """Lines of the journal that the run's folder lacks."""
    damaged: int = 0
    """Lines of the record that cannot be read, and are left out."""


def check_writable(config: TrainConfig) -> None:
    """Raises StorageError when the run's folder cannot be written to; that its disk is full may pass."""
    folder, key = open_storage(config.run), f".writable-{secrets.token_hex(8)}"
    with suppress(DiskFullError):
        folder.write(key, b"")
        folder.delete(key)


def carried_over(config: TrainConfig, found: Checkpoint | None, attempt: int) -> Carried:
    """What an attempt goes on from: of this folder or, where `found` has them along, of the checkpoint.

    The record is the checkpoint's: that of this machine may lack steps that another one has taken, or have
    some that did not last. The journals of all machines are put together. Raises StorageError.
    """
    folder = Path(config.run)
    step = found.manifest.step if found else 0
    along = found if config.checkpoint.url else None
    rows, events = (_along(along, name) for name in (METRICS, EVENTS))
    try:
        if rows is None:
            rows = record.rows_before(folder, attempt)
        known = set(_lines_of(folder / EVENTS)) if events else set()
    except OSError as error:
        raise StorageError(
            f"{folder}: its {METRICS} or {EVENTS} cannot be read: {error.strerror}; a new record would lack "
            "what they hold. Mend the disk, or move the file away to go on without it"
        ) from error
    new = [line for line in events or () if line not in known]
    return Carried(record.rows_up_to(step, rows), new, record.unreadable(rows))


def _along(found: Checkpoint | None, name: str) -> list[str] | None:
    """The lines of a file that a checkpoint has along; None where it has none."""
    if found is None:
        return None
    try:
        return found.storage.read(f"{found.path}/{name}").decode(errors="replace").splitlines()
    except MissingKeyError:  # saved when checkpoint.url was not set, or while the file was gone
        return None


def _lines_of(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


class Logbook:
    """Everything that one attempt writes into the run's folder.

    A disk that is full, or fails, and a mirror that breaks cost an alarm each: a line on the screen and,
    as soon as it can be written, an event in the journal.
    """

    def __init__(
        self,
        config: TrainConfig,
        root: Storage,
        attempt: int,
        carried: Carried,
        step: Callable[[], int],
        say: Say,
    ) -> None:
        """`root` is where the run keeps its attempts; `step` tells how many steps are taken."""
        self._attempt, self._step, self._say = attempt, step, say
        self._early: list[str] | None = []
        self._is_closed = False
        folder = Path(config.run)
        self._journal = Journal(folder / EVENTS, self._alarm)
        self._journal.take_over(carried.events)
        self._record = Record(
            folder, root, attempt, config=dump(config), rows=carried.rows, alarm=self._alarm
        )
        self._mirrors = open_mirrors(config, step(), self._alarm)
        if carried.damaged:
            self._alarm(f"{folder / METRICS}: {carried.damaged} damaged lines are left out from now on")

    def event(self, event: Event, /, **details: object) -> None:
        """Write an event; the first one of an attempt says how it starts."""
        self._journal.write(event, attempt=self._attempt, step=self._step(), **details)
        early, self._early = self._early, None
        for text in early or ():
            self.event(Event.ALARM, text=text)

    def row(self, values: dict[str, float | None]) -> None:
        """Write the numbers of a log point."""
        self._record.write(self._step(), values)
        for mirror in self._mirrors:
            mirror.write(self._step(), values)

    def close(self) -> str:
        """End it; an alarm for what could not be written. Returns that in words; empty when all was.

        A second time it does nothing.
        """
        if self._is_closed:
            return ""
        self._is_closed = True
        for mirror in self._mirrors:
            mirror.close()
        problem = "; ".join(filter(None, (self._record.close(), self._journal.close())))
        if problem:
            self._say(f"ALARM: {problem}")
        return problem

    def _alarm(self, text: str) -> None:
        self._say(f"ALARM: {text}")
        if self._early is None:
            self.event(Event.ALARM, text=text)
        else:
            self._early.append(text)  # the journal of an attempt begins with its start
