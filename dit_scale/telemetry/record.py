"""metrics.jsonl and config.yaml of a run: each attempt writes its own files, and links point to the newest.

    <run>/records/<attempt>.jsonl   <run>/metrics.jsonl    links to the file of the newest attempt
    <run>/records/<attempt>.yaml    <run>/config.yaml      likewise

An attempt first copies the rows up to the step from which it resumes, so each record reads as one unbroken
run. Then it writes the .yaml, which marks the copy as complete, then the links. A stale process that resumes
writes only its own files, and every process sets the links to the newest attempt on the chain. Nothing that a
later attempt has written is lost.
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
from dit_scale.lines import Alarm, LineFile, parse_object
from dit_scale.storage import Storage, open_storage

METRICS, CONFIG = "metrics.jsonl", "config.yaml"
RECORDS = "records"
_WITHOUT_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class Record:
    """The record of one attempt: one object per log point and evaluation, written before the next step."""

    def __init__(
        self, folder: Path, root: Storage, attempt: int, *, config: str, rows: Iterable[str], alarm: Alarm
    ) -> None:
        """`root` holds the chain of attempts; `rows` are the lines up to the step of the resume."""
        self._folder, self._root, self._attempt = folder, root, attempt
        self._config, self._alarm = config.encode(), alarm
        self._problem = ""
        for name in (METRICS, CONFIG):
            with suppress(OSError):  # left by an earlier run in this folder
                own_path(folder, attempt, name).unlink()
        self._lines = LineFile(own_path(folder, attempt, METRICS), alarm)
        self._lines.append_lines("".join(f"{row}\n" for row in rows).encode())
        self.publish()

    def write(self, step: int, record: dict[str, float | None]) -> None:
        """Append the record of a log point or of an evaluation."""
        self._lines.append(json.dumps({"step": step, **record}))
        self.publish()

    def close(self) -> str:
        """Close the file and return what could not be written; empty if nothing."""
        problem = self._lines.close()
        self.publish()
        return problem or self._problem

    def publish(self) -> None:
        """Point the links of the run folder to the newest attempt, if they do not yet. Raises nothing."""
        if not self._lines.is_complete:
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
            self._alarm(f"{problem}; retrying at each log point")
        self._problem = problem

    def _is_published(self) -> bool:
        return all(
            _is_same(self._folder / name, own_path(self._folder, self._attempt, name))
            for name in (METRICS, CONFIG)
        )


def publish(folder: Path, root: Storage, attempt: int) -> None:
    """Point the links of `folder` to the newest attempt: this one, or a later one on the chain.

    The chain is read again afterwards, until it has not changed. A process that was stopped in between thus
    repairs links that it has set too late. Raises OSError or StorageError.
    """
    newest = 0
    while (latest := max(attempts.numbers(root), default=attempt)) > newest:
        newest = max(latest, attempt)
        with suppress(FileNotFoundError):  # a later attempt that has only just started will set its own
            for name in (CONFIG, METRICS):
                _link(own_path(folder, newest, name), folder / name)


def rows_before(folder: Path, attempt: int) -> list[str]:
    """Return the lines of the newest record of an earlier attempt; without one, those of metrics.jsonl."""
    numbers = [number for number in recorded(folder) if number < attempt]
    path = own_path(folder, max(numbers), METRICS) if numbers else folder / METRICS
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def rows_up_to(step: int, lines: Iterable[str]) -> list[str]:
    """Return the lines without steps that will be taken again, and without damaged lines."""
    return [line for line in lines if 0 <= _step_of(line) <= step]


def unreadable(lines: Sequence[str]) -> int:
    """Return the number of damaged lines; a torn last line does not count, because a kill can leave one."""
    return sum(_step_of(line) < 0 for line in lines[:-1])


def drop_before(folder: Path, attempt: int) -> None:
    """Delete the records from which no later attempt can resume: all before the predecessor of this one.

    Any process may do this at any time. Raises OSError.
    """
    before = max((number for number in recorded(folder) if number < attempt), default=0)
    for path in (folder / RECORDS).glob("[0-9]*"):
        if path.stem.isdecimal() and int(path.stem) < before:
            path.unlink(missing_ok=True)


def recorded(folder: Path) -> list[int]:
    """Return the attempts that have written their .yaml, and so all rows before their resume; ascending."""
    names = (path.stem for path in (folder / RECORDS).glob("*.yaml"))
    return sorted(int(name) for name in names if name.isdecimal())


def own_key(attempt: int, name: str) -> str:
    """Return the key of an attempt's own file of this name, relative to the run folder."""
    return f"{RECORDS}/{attempt:04d}{Path(name).suffix}"


def own_path(folder: Path, attempt: int, name: str) -> Path:
    """Return the path of an attempt's own file of this name."""
    return folder / own_key(attempt, name)


def _link(file: Path, name: Path) -> None:
    """Link `name` to a file, replacing what is there."""
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
    """Return the step of a line; -1 if it is damaged."""
    row = parse_object(line, "step")
    return row["step"] if row is not None and isinstance(row["step"], int) else -1
