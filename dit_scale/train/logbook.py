"""What rank 0 records of an attempt: journal, record, mirrors and messages. None of them can stop the run."""

import secrets
import socket
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
from dit_scale.telemetry.webhook import Notice, Webhook
from dit_scale.train.run_folder import EVENTS, METRICS


@dataclass(frozen=True)
class Carried:
    """Lines that an attempt carries over from earlier ones."""

    rows: Sequence[str] = ()
    """Lines of the record, up to the step of the checkpoint."""
    events: Sequence[str] = ()
    """Lines of the journal that the run folder lacks."""
    damaged: int = 0
    """Number of unreadable lines of the record, which are dropped."""


def check_writable(config: TrainConfig) -> None:
    """Raise StorageError when the run folder is not writable. A full disk is no error: it may become free."""
    folder, key = open_storage(config.run), f".writable-{secrets.token_hex(8)}"
    with suppress(DiskFullError):
        folder.write(key, b"")
        folder.delete(key)


def carried_over(config: TrainConfig, checkpoint: Checkpoint | None, attempt: int) -> Carried:
    """The lines to carry over, from the checkpoint if it holds record and journal, else from the run folder.

    The checkpoint's record takes precedence: the local one may lack steps that another machine took, or hold
    steps that were rolled back. The journals are merged. Raises StorageError.
    """
    folder = Path(config.run)
    step = checkpoint.manifest.step if checkpoint else 0
    source = checkpoint if config.checkpoint.url else None
    rows, events = (_lines_in_checkpoint(source, name) for name in (METRICS, EVENTS))
    try:
        if rows is None:
            rows = record.rows_before(folder, attempt)
        known = set(_lines_of(folder / EVENTS)) if events else set()
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot read {METRICS} or {EVENTS}: {error.strerror}; a new record would lack their "
            "lines. Repair the disk, or move the file away to continue without it"
        ) from error
    new = [line for line in events or () if line not in known]
    # A run that starts over repeats even the evaluation before its first step.
    kept = record.rows_up_to(step, rows) if checkpoint else ()
    return Carried(kept, new, record.unreadable(rows))


def _lines_in_checkpoint(checkpoint: Checkpoint | None, name: str) -> list[str] | None:
    """The lines of a file that the checkpoint carries; None when it does not."""
    if checkpoint is None:
        return None
    try:
        return checkpoint.storage.read(f"{checkpoint.path}/{name}").decode(errors="replace").splitlines()
    except MissingKeyError:  # saved without checkpoint.url, or while the file was missing
        return None


def _lines_of(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


class Logbook:
    """Everything that one attempt writes into the run folder.

    A disk that is full or fails, or a mirror that breaks, raises an alarm: a line on the terminal and, as
    soon as it can be written, an entry in the journal.
    """

    def __init__(
        self,
        *,
        config: TrainConfig,
        root: Storage,
        attempt: int,
        carried: Carried,
        step: Callable[[], int],
        say: Say,
    ) -> None:
        """`root` is the state root of the run; `step` returns the number of steps taken."""
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
        self._webhook = Webhook(config.run, root, socket.gethostname(), self._alarm)
        if carried.damaged:
            self._alarm(f"{folder / METRICS}: dropped {carried.damaged} damaged lines")

    def event(self, event: Event, /, **details: object) -> None:
        """Write an entry into the journal; the first one of an attempt must be its START."""
        self._journal.write(event, attempt=self._attempt, step=self._step(), **details)
        early, self._early = self._early, None
        for text in early or ():
            self.event(Event.ALARM, text=text)

    def notify(self, notice: Notice, reason: str) -> None:
        """Send a message to the webhook; there is at most one of a kind per attempt and step."""
        once = f"{self._attempt:04d}-{self._step()}" if notice != Notice.DONE else str(self._step())
        self._webhook.send(notice, self._step(), reason, once=once)

    def row(self, values: dict[str, float | None]) -> None:
        """Write the values of a log point or of an evaluation."""
        self._record.write(self._step(), values)
        for mirror in self._mirrors:
            mirror.write(self._step(), values)

    def picture(self, name: str, path: Path) -> None:
        """Show an image file in the mirrors."""
        for mirror in self._mirrors:
            mirror.picture(self._step(), name, path)

    def close(self) -> str:
        """Flush and close everything. Raises an alarm for, and returns, what could not be written; else "".

        May be called more than once.
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
            self._early.append(text)  # the journal of an attempt starts with its START entry
