"""Append-only files of lines on a disk that is full or fails, and when the file is removed."""

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_scale import lines
from dit_scale.lines import LineFile
from tests.support.faults.small_disk import fill, small_disk

LONG = "x" * 1000
"""A line; a page holds about four of them."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 2**20) as folder:
        yield folder


@pytest.fixture
def alarms() -> list[str]:
    return []


def numbered(count: int, first: int = 0) -> list[str]:
    return [f"{number} {LONG}" for number in range(first, first + count)]


def read(path: Path) -> list[str]:
    return path.read_text().split("\n")


def test_a_line_is_in_the_file_when_append_returns(tmp_path: Path, alarms: list[str]) -> None:
    file = LineFile(tmp_path / "new" / "events.jsonl", alarms.append)
    for count in (1, 2, 3):
        file.append("line")
        assert read(tmp_path / "new/events.jsonl") == [*["line"] * count, ""]
    assert (file.close(), alarms) == ("", [])


def test_lines_are_buffered_while_the_disk_is_full(disk: Path, alarms: list[str]) -> None:
    path = disk / "events.jsonl"
    file = LineFile(path, alarms.append)
    file.append("first")
    filler = fill(disk)
    for line in numbered(20):
        file.append(line)
    assert not file.is_complete
    assert len(read(path)) < 10, "the last page had room for some of them, and for part of one"
    assert not path.read_text().endswith("\n")
    (alarm,) = alarms
    assert (
        "events.jsonl cannot be written: No space left on device; its lines are buffered in memory" in alarm
    )
    filler.unlink()
    file.append("last")
    assert file.is_complete
    assert read(path) == ["first", *numbered(20), "last", ""]
    assert "can be written again; all buffered lines are written" in alarms[1]
    assert (file.close(), len(alarms)) == ("", 2)


def test_a_second_outage_has_its_own_alarm(disk: Path, alarms: list[str]) -> None:
    file = LineFile(disk / "events.jsonl", alarms.append)
    for round_ in range(3):
        filler = fill(disk)
        for line in numbered(8, 8 * round_):
            file.append(line)
        filler.unlink()
        file.flush()
    assert read(file.path) == [*numbered(24), ""]
    assert len(alarms) == 6


def test_the_buffer_is_bounded_and_dropped_lines_are_counted(
    disk: Path, alarms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_BUFFERED_BYTES", 10 * len(numbered(1)[0]) + 50)
    filler = fill(disk)
    file = LineFile(disk / "events.jsonl", alarms.append)
    for line in numbered(15):
        file.append(line)
    filler.unlink()
    file.append("last")
    assert read(file.path)[:10] == numbered(10)
    assert "except 5 dropped" in alarms[1] or "except 6 dropped" in alarms[1]
    assert file.close().startswith(f"{file.path} is missing {file.dropped} lines")


def test_close_reports_the_lines_that_could_not_be_written(disk: Path, alarms: list[str]) -> None:
    fill(disk)
    file = LineFile(disk / "events.jsonl", alarms.append)
    for line in numbered(8):
        file.append(line)
    assert file.close() == f"{file.path} is missing 8 lines: No space left on device"


def test_a_file_that_must_not_grow(tmp_path: Path, alarms: list[str]) -> None:
    """A real limit gives another error than a full disk: EFBIG."""
    file = LineFile(tmp_path / "events.jsonl", alarms.append)
    file.append("first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        for line in numbered(8):
            file.append(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.path.stat().st_size == 3000
    assert len(alarms) == 1
    assert "File too large" in alarms[0]
    file.append("last")
    assert read(file.path) == ["first", *numbered(8), "last", ""]


def test_a_folder_that_was_replaced_by_a_file(tmp_path: Path, alarms: list[str]) -> None:
    folder = tmp_path / "run"
    file = LineFile(folder / "events.jsonl", alarms.append)
    file.append("first")
    shutil.rmtree(folder)
    folder.write_text("")
    file.append("second")
    assert len(alarms) == 1
    folder.unlink()
    file.append("third")
    assert read(file.path) == ["first", "second", "third", ""]
    assert file.close() == ""


def test_a_removed_folder_is_created_again_with_the_earlier_lines(tmp_path: Path, alarms: list[str]) -> None:
    file = LineFile(tmp_path / "run" / "events.jsonl", alarms.append)
    for line in numbered(3):
        file.append(line)
    shutil.rmtree(tmp_path / "run")
    file.append("next")
    assert read(file.path) == [*numbered(3), "next", ""]
    (alarm,) = alarms
    assert "was removed or replaced; writing continues in a new file" in alarm


def test_a_folder_is_removed_while_the_disk_is_full(disk: Path, alarms: list[str]) -> None:
    file = LineFile(disk / "run" / "events.jsonl", alarms.append)
    file.append("first")
    filler = fill(disk)
    for line in numbered(8):
        file.append(line)
    shutil.rmtree(disk / "run")
    file.append("next")
    filler.unlink()
    file.append("last")
    assert read(file.path) == ["first", *numbered(8), "next", "last", ""]
    assert file.close() == ""


def test_writing_continues_in_a_file_that_was_replaced(tmp_path: Path, alarms: list[str]) -> None:
    file = LineFile(tmp_path / "events.jsonl", alarms.append)
    file.append("first")
    (tmp_path / "edited").write_text("edited\n")
    (tmp_path / "edited").replace(file.path)
    file.append("next")
    assert read(file.path) == ["edited", "next", ""]


def test_two_processes_can_append_to_one_file(tmp_path: Path, alarms: list[str]) -> None:
    """Also after a third one that was killed in the middle of a line."""
    path = tmp_path / "events.jsonl"
    live = LineFile(path, alarms.append)
    live.append("first")
    with path.open("a") as torn:
        torn.write("half")
    old = LineFile(path, alarms.append)
    live.append("second")
    old.append("third")
    live.append("fourth")
    assert read(path) == ["first", "half", "second", "third", "fourth", ""]
    old.close()
    live.close()


def test_half_a_line_gets_its_newline(tmp_path: Path, alarms: list[str]) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("first\nhal")
    file = LineFile(path, alarms.append)
    file.append("second")
    assert read(path) == ["first", "hal", "second", ""]
    assert (file.close(), alarms) == ("", [])
