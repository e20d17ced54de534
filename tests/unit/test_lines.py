"""A file of lines on disks that are full, fail, or lose it."""

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_scale import lines
from dit_scale.lines import LineFile
from tests.support.faults.small_disk import fill, small_disk

LONG = "x" * 1000
"""A line; four and a bit fill a page."""


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


def test_lines_wait_while_the_disk_is_full(disk: Path, alarms: list[str]) -> None:
    path = disk / "events.jsonl"
    file = LineFile(path, alarms.append)
    file.append("first")
    filler = fill(disk)
    for line in numbered(20):
        file.append(line)
    assert not file.is_whole
    assert len(read(path)) < 10, "some of them fitted into the last page, one of them in part"
    assert not path.read_text().endswith("\n")
    (alarm,) = alarms
    assert "events.jsonl cannot be written: No space left on device; its lines are kept in memory" in alarm
    filler.unlink()
    file.append("last")
    assert file.is_whole
    assert read(path) == ["first", *numbered(20), "last", ""]
    assert "written again, and has the lines that were kept" in alarms[1]
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


def test_what_waits_is_bounded_and_what_is_lost_is_counted(
    disk: Path, alarms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "KEPT_BYTES", 10 * len(numbered(1)[0]) + 50)
    filler = fill(disk)
    file = LineFile(disk / "events.jsonl", alarms.append)
    for line in numbered(15):
        file.append(line)
    filler.unlink()
    file.append("last")
    assert read(file.path)[:10] == numbered(10)
    assert "but for 5 lines" in alarms[1] or "but for 6 lines" in alarms[1]
    assert file.close().startswith(f"{file.path} lacks {file.lost} lines")


def test_what_could_not_be_written_to_the_end_is_said(disk: Path, alarms: list[str]) -> None:
    fill(disk)
    file = LineFile(disk / "events.jsonl", alarms.append)
    for line in numbered(8):
        file.append(line)
    assert file.close() == f"{file.path} lacks 8 lines: No space left on device"


def test_a_file_that_may_not_grow(tmp_path: Path, alarms: list[str]) -> None:
    """Another error than that of a full disk, by a real limit: EFBIG."""
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


def test_a_folder_in_whose_place_there_is_a_file(tmp_path: Path, alarms: list[str]) -> None:
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


def test_a_folder_that_was_removed_is_made_again_with_what_was_in_the_file(
    tmp_path: Path, alarms: list[str]
) -> None:
    file = LineFile(tmp_path / "run" / "events.jsonl", alarms.append)
    for line in numbered(3):
        file.append(line)
    shutil.rmtree(tmp_path / "run")
    file.append("next")
    assert read(file.path) == [*numbered(3), "next", ""]
    (alarm,) = alarms
    assert "was removed or replaced, and is written anew" in alarm


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


def test_a_file_that_a_person_replaced_is_gone_on_with(tmp_path: Path, alarms: list[str]) -> None:
    file = LineFile(tmp_path / "events.jsonl", alarms.append)
    file.append("first")
    (tmp_path / "edited").write_text("edited\n")
    (tmp_path / "edited").replace(file.path)
    file.append("next")
    assert read(file.path) == ["edited", "next", ""]


def test_two_processes_that_append_take_nothing_from_each_other(tmp_path: Path, alarms: list[str]) -> None:
    """And nothing from a third that was killed in the middle of a line."""
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


def test_half_a_line_gets_its_end(tmp_path: Path, alarms: list[str]) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("first\nhal")
    file = LineFile(path, alarms.append)
    file.append("second")
    assert read(path) == ["first", "hal", "second", ""]
    assert (file.close(), alarms) == ("", [])
