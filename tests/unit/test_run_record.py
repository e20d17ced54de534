"""The record of an attempt: the rows it starts with, its own rows, and the links of the run folder."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from dit_scale.checkpoint.attempts import AttemptRecord, claim
from dit_scale.config import TrainConfig
from dit_scale.storage import open_storage
from dit_scale.telemetry import record
from dit_scale.telemetry.record import Record, own_path, recorded, rows_before, rows_up_to
from dit_scale.train.logbook import Logbook, carried_over
from tests.support.faults.small_disk import fill, small_disk


class Run:
    """A run folder, and the attempts that write into it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, open_storage(folder)
        self.alarms: list[str] = []
        self.claimed = 0

    def claim(self) -> int:
        """Start another attempt and return its number."""
        self.claimed += 1
        claim(self.root, AttemptRecord(self.claimed))
        return self.claimed

    def open(self, attempt: int, resume_step: int = 0) -> Record:
        rows = rows_up_to(resume_step, rows_before(self.folder, attempt))
        config = f"attempt: {attempt}\n"
        return Record(self.folder, self.root, attempt, config=config, rows=rows, alarm=self.alarms.append)

    def begin(self, resume_step: int = 0) -> Record:
        return self.open(self.claim(), resume_step)

    def write(self, resume_step: int, *steps: int) -> None:
        """Write the record of a complete attempt."""
        one = self.begin(resume_step)
        write_steps(one, steps)
        assert one.close() == ""

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def steps(self) -> list[int]:
        return [json.loads(line)["step"] for line in self.metrics.read_text().splitlines()]

    @property
    def config(self) -> str:
        return (self.folder / "config.yaml").read_text()


def write_steps(one: Record, steps: Sequence[int]) -> None:
    for step in steps:
        one.write(step, {"loss": step / 3})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_a_record_is_one_object_per_line(run: Run) -> None:
    run.write(0, 100, 200)
    assert run.metrics.read_text() == (
        '{"step": 100, "loss": 33.333333333333336}\n{"step": 200, "loss": 66.66666666666667}\n'
    )
    assert run.config == "attempt: 1\n"
    assert run.alarms == []


def test_a_line_is_written_before_the_next_step(run: Run) -> None:
    one = run.begin()
    one.write(1, {"loss": 1.0})
    assert run.steps == [1]
    one.close()


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(0, []), (199, [100]), (200, [100, 200]), (999, [100, 200, 300])]
)
def test_steps_taken_again_are_dropped(run: Run, resume_step: int, kept: list[int]) -> None:
    run.write(0, 100, 200, 300)
    before = run.metrics.read_text().splitlines()
    run.write(resume_step, 1000)
    assert run.steps == [*kept, 1000]
    assert run.metrics.read_text().splitlines()[:-1] == before[: len(kept)]


TORN = [b'{"step": 30', b'{"step": 300, "lo', b"{", b'{"step": 300, "loss": 1.0}', b"\0\0\0", b"3", b"\xff"]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_last_line_counts_as_never_written(run: Run, torn: bytes) -> None:
    run.write(0, 100, 200)
    with run.metrics.open("ab") as file:
        file.write(torn)
    run.write(200, 300, 400)
    assert run.steps == [100, 200, 300, 400]


def test_a_run_without_records_resumes_from_its_metrics(run: Run) -> None:
    """Runs of an earlier version have one metrics.jsonl for all attempts."""
    run.folder.mkdir()
    run.metrics.write_text('{"step": 100}\n{"step": 200}')
    run.write(200, 300)
    assert run.steps == [100, 200, 300]


def test_only_the_last_two_records_are_kept(run: Run) -> None:
    for step in range(5):
        run.write(step, step + 1)
    assert recorded(run.folder) == [4, 5]
    assert sorted(path.name for path in (run.folder / "records").iterdir()) == [
        "0004.jsonl",
        "0004.yaml",
        "0005.jsonl",
        "0005.yaml",
    ]


@pytest.mark.parametrize("rows", ["", '{"step": 1, "lo'])
def test_an_attempt_that_was_killed_while_it_started_its_record(run: Run, rows: str) -> None:
    run.write(0, 1, 2)
    for _ in range(2):
        own_path(run.folder, run.claim(), "metrics.jsonl").write_text(rows)
        assert run.steps == [1, 2]
    late = run.open(2, 2)
    assert run.steps == [1, 2]
    late.close()
    run.write(2, 3)
    assert run.steps == [1, 2, 3]
    run.write(3, 4)
    assert run.steps == [1, 2, 3, 4]
    assert recorded(run.folder) == [4, 5]


def test_a_folder_of_an_earlier_run_starts_with_an_empty_record(run: Run) -> None:
    for _ in range(3):
        run.write(0, 100)
    shutil.rmtree(run.folder / "attempts")
    run.claimed = 0
    run.write(0, 1)
    run.write(1, 2)
    assert run.steps == [1, 2]
    assert run.config == "attempt: 2\n"


def test_a_copied_folder_resumes(run: Run, tmp_path: Path) -> None:
    """A copy has two files instead of two links to one."""
    run.write(0, 1, 2)
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "copy")))
    copy.claimed = 1
    copy.write(1, 2, 3)
    assert copy.steps == [1, 2, 3]
    assert run.steps == [1, 2]


def test_a_stale_attempt_does_not_take_the_links_from_a_later_one(run: Run) -> None:
    old = run.claim()
    live = run.begin()
    write_steps(live, [1, 2])
    late = run.open(old)
    write_steps(late, [7, 8])
    assert run.steps == [1, 2]
    assert run.config == "attempt: 2\n"
    write_steps(live, [3])
    assert (late.close(), live.close()) == ("", "")
    assert run.steps == [1, 2, 3]
    assert run.config == "attempt: 2\n"


def test_the_next_line_repairs_links_that_a_stale_attempt_has_set(run: Run) -> None:
    old = run.begin()
    live = run.begin()
    for name in ("metrics.jsonl", "config.yaml"):
        (run.folder / name).unlink()
        os.link(own_path(run.folder, 1, name), run.folder / name)
    write_steps(live, [1])
    assert (run.steps, run.config) == ([1], "attempt: 2\n")
    old.close()
    live.close()


def test_a_later_attempt_that_has_only_claimed_its_number(run: Run) -> None:
    live = run.begin()
    run.claim()
    write_steps(live, [1])
    live.close()
    assert (run.steps, run.config) == ([1], "attempt: 1\n")


@pytest.mark.parametrize("where", ["from the start", "later"])
def test_a_full_disk(tmp_path: Path, where: str) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        run = Run(disk / "run")
        run.write(0, *range(1, 200))
        if where == "later":
            one = run.begin(resume_step=150)
            filler = fill(disk)
        else:
            number = run.claim()
            filler = fill(disk)
            one = run.open(number, resume_step=150)
        write_steps(one, range(151, 350))
        assert len(run.metrics.read_text().splitlines()) < 349
        (alarm,) = run.alarms
        assert "No space left on device" in alarm
        filler.unlink()
        write_steps(one, [350])
        assert one.close() == ""
        assert run.steps == [*range(1, 351)]
        assert run.config == "attempt: 2\n"
        assert len(run.alarms) == 2


def test_a_removed_folder_is_restored_with_all_rows(run: Run) -> None:
    one = run.begin()
    write_steps(one, [1, 2])
    shutil.rmtree(run.folder)
    write_steps(one, [3])
    assert (run.steps, run.config) == ([1, 2, 3], "attempt: 1\n")
    shutil.rmtree(run.folder)
    assert one.close() == ""
    assert (run.steps, run.config) == ([1, 2, 3], "attempt: 1\n")
    assert ["was removed" in alarm for alarm in run.alarms] == [True, True]


def test_a_file_system_without_hard_links(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    one = run.begin()
    one.close()
    monkeypatch.setattr(record.os, "link", refuse)
    folder = run.folder
    record.publish(folder, run.root, 1)
    run.metrics.unlink()
    record.publish(folder, run.root, 1)
    assert run.metrics.is_symlink()
    assert run.metrics.samefile(own_path(folder, 1, "metrics.jsonl"))
    moved = folder.rename(folder.parent / "moved")
    assert (moved / "metrics.jsonl").is_file()


def test_a_damaged_line_is_left_out_and_reported(tmp_path: Path) -> None:
    config = TrainConfig(run=str(tmp_path))
    lines = ['{"step": 1, "loss": 0.5}', '{"step": 2, "lo\x12s": 0.5}', '{"step": 3, "loss": 0.5}', '{"step']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    messages: list[str] = []
    carried = carried_over(config, None, 1)
    logbook = Logbook(
        config=config,
        root=open_storage(tmp_path),
        attempt=1,
        carried=carried,
        step=lambda: 3,
        say=messages.append,
    )
    logbook.close()
    assert messages == [f"ALARM: {tmp_path}/metrics.jsonl: dropped 1 damaged lines"]
    assert carried.damaged == 1, "the torn last line was never written"
