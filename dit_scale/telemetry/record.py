"""metrics.jsonl and config.yaml of a run: written by each attempt into files of its own, and named by links.

    <run>/records/<attempt>.jsonl   <run>/metrics.jsonl    a link to that of the newest attempt
    <run>/records/<attempt>.yaml    <run>/config.yaml      the same

An attempt begins its record with the rows that it goes on from, so that each reads as one unbroken run. Then
comes the .yaml, which marks the record as begun in full, then the links. A process that was stopped, and
wakes up when a later attempt has begun, has only its own files to write, and whoever sets the links sets them
to the newest attempt on the chain: nothing of a later attempt is lost.
"""

import errno
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from dit_scale.checkpoint import attempts
from dit_scale.errors import StorageError
from dit_scale.lines import Alarm, LineFile, parsed
from dit_scale.storage import Storage, open_storage

METRICS, CONFIG = "metrics.jsonl", "config.yaml"
RECORDS = "records"
_WITHOUT_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class Record:
    """The record of one attempt, one object per log point, each line written before the next step."""

    def __init__(
        self, folder: Path, root: Storage, attempt: int, config: str, rows: Iterable[str], alarm: Alarm
    ) -> None:
        """`rows` are the lines that it goes on from, `root` is where the run keeps its chain of attempts."""
        self._folder, self._root, self._attempt = folder, root, attempt
        self._config, self._alarm = config.encode(), alarm
        self._problem = ""
        for name in (METRICS, CONFIG):
            with suppress(OSError):  # left by another run that had this folder
                own_path(folder, attempt, name).unlink()
        self._lines = LineFile(own_path(folder, attempt, METRICS), alarm)
        self._lines.append_lines("".join(f"{row}\n" for row in rows).encode())
        self.publish()

    def write(self, step: int, record: dict[str, float | None]) -> None:
        self._lines.append(json.dumps({"step": step, **record}))
        self.publish()

    def close(self) -> str:
        """Returns what could not be written, in words; empty when all was."""
        problem = self._lines.close()
        self.publish()
        return problem or self._problem

    def publish(self) -> None:
        """Let the run's folder name the files of the newest attempt, unless it does. Raises nothing."""
        if not self._lines.is_whole:
            return
        try:
            if self._is_published():
                return
            self._lines.sync()
            if not own_path(self._folder, self._attempt, CONFIG).is_file():
                open_storage(self._folder).write(own_key(self._attempt, CONFIG), self._config)
            publish(self._folder, self._root, self._attempt)
            drop_before(self._folder, self._attempt)
            problem = ""
        except (OSError, StorageError) as error:
            problem = f"{self._folder}: {METRICS} and {CONFIG} are not up to date: {error}"
        if problem and not self._problem:
            self._alarm(f"{problem}; tried again at each log point")
        self._problem = problem

    def _is_published(self) -> bool:
        return all(
            _is_same(self._folder / name, own_path(self._folder, self._attempt, name))
            for name in (METRICS, CONFIG)
        )


def publish(folder: Path, root: Storage, attempt: int) -> None:
    """Let `folder` name the files of the newest attempt: of this one, or of a later one on the chain.

    The chain is asked again behind that, until its answer stays: who was stopped in between mends what it
    has done. Raises OSError or StorageError.
    """
    newest = 0
    while (latest := max(attempts.numbers(root), default=attempt)) > newest:
        newest = max(latest, attempt)
        with suppress(FileNotFoundError):  # a later attempt that has only just begun sets its own
            for name in (CONFIG, METRICS):
                _link(own_path(folder, newest, name), folder / name)


def rows_before(folder: Path, attempt: int) -> list[str]:
    """The lines of the newest record before this attempt's; of a run without any, those of metrics.jsonl."""
    numbers = [number for number in recorded(folder) if number < attempt]
    path = own_path(folder, max(numbers), METRICS) if numbers else folder / METRICS
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def rows_up_to(step: int, lines: Iterable[str]) -> list[str]:
    """Without the steps that will be taken again, and without a line that a kill has torn."""
    return [line for line in lines if 0 <= _step_of(line) <= step]


def unreadable(lines: Sequence[str]) -> int:
    """How many lines are damaged; a last one that a kill has torn is not among them."""
    return sum(_step_of(line) < 0 for line in lines[:-1])


def drop_before(folder: Path, attempt: int) -> None:
    """Delete the records that no later attempt goes on from: all before the newest one before this.

    Any process may do that at any time. Raises OSError.
    """
    before = max((number for number in recorded(folder) if number < attempt), default=0)
    for path in (folder / RECORDS).glob("[0-9]*"):
        if path.stem.isdecimal() and int(path.stem) < before:
            path.unlink(missing_ok=True)


def recorded(folder: Path) -> list[int]:
    """The attempts whose record has all the rows that it goes on from, ascending: their .yaml comes last."""
    names = (path.stem for path in (folder / RECORDS).glob("*.yaml"))
    return sorted(int(name) for name in names if name.isdecimal())


def own_key(attempt: int, name: str) -> str:
    """Key of an attempt's own file of this name, below the run's folder."""
    return f"{RECORDS}/{attempt:04d}{Path(name).suffix}"


def own_path(folder: Path, attempt: int, name: str) -> Path:
    """Where an attempt's own file of this name is."""
    return folder / own_key(attempt, name)


def _link(file: Path, name: Path) -> None:
    """Give a file a further name, in place of what has it now."""
    if _is_same(file, name):
        return
    new = name.with_name(f".{name.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            os.link(file, new)
        except OSError as error:
            if error.errno not in _WITHOUT_HARD_LINKS:
                raise
            new.symlink_to(os.path.relpath(file, name.parent))
        os.replace(new, name)
    finally:
        new.unlink(missing_ok=True)


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _step_of(line: str) -> int:
    """The step of a line; -1 for one that is torn."""
    row = parsed(line, "step")
    return row["step"] if row is not None and isinstance(row["step"], int) else -1
