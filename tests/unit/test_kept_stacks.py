"""Stacks of ranks that make no progress: those that show where a rank stood are kept, even after it exits."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from dit_scale.elastic.board import Round
from dit_scale.elastic.node import diagnosis, launcher
from dit_scale.elastic.node.deadlines import Deadlines, Standing
from dit_scale.elastic.node.diagnosis import Diagnosis
from dit_scale.elastic.node.launcher import Launcher
from dit_scale.elastic.node.processes import ProcessTable
from dit_scale.elastic.node.rank_files import RankFiles
from dit_scale.elastic.node.stacks import StackArchive
from dit_scale.heartbeat import Phase
from tests.support.faults.small_disk import fill, small_disk
from tests.support.nodes.members import member_of

WAITS = Standing(rank=0, pid=11, phase=Phase.COMPUTE, step=20, age_s=9.0, limit_s=8.0, quiet_s=8.0)
READS = Standing(rank=1, pid=12, phase=Phase.DATA, step=20, age_s=9.0, limit_s=310.0, quiet_s=8.0)
TWO_RANKS = (member_of("a", slots=2),)


def diagnosis_of(folder: Path) -> Diagnosis:
    """A diagnosis of round 1 whose ranks have written nothing."""
    return Diagnosis(
        round_number=1,
        files=RankFiles(folder, range(2)),
        processes=ProcessTable(),
        deadlines=Deadlines(),
        archive=StackArchive(folder / "stacks", 1, print),
        record=lambda event, **details: None,
        say=print,
    )


def launcher_of(folder: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> Launcher:
    """A launcher that starts no process."""
    monkeypatch.setattr(launcher.subprocess, "Popen", lambda *command, **more: None)
    return Launcher(
        command=[],
        folder=folder,
        deadlines=Deadlines(),
        stacks=folder / "stacks",
        record=lambda event, **details: None,
        say=logged.append,
    )


def test_stacks_are_requested_once_per_place_and_the_last_ones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def ask(folder: Path, ranks: Iterable[int], signal_to: Callable[[int], None]) -> dict[int, str]:
        asked.append(list(ranks))
        return {rank: f"answer {len(asked)}" for rank in asked[-1]}

    monkeypatch.setattr(diagnosis, "ask_for_stacks", ask)
    ranks = diagnosis_of(tmp_path)
    ranks.waiting([WAITS, READS])
    ranks.waiting([WAITS, READS])
    assert asked == [[0, 1]]
    ranks.waiting([WAITS, replace(READS, phase=Phase.COMPUTE)])
    assert asked == [[0, 1]] * 2

    ranks.waiting([])  # another node has killed its ranks, and these have exited
    ranks.keep_stacks()
    kept = [path.read_text() for path in sorted((tmp_path / "stacks").iterdir())]
    assert kept == ["answer 2", "answer 2"]

    ranks.waiting([replace(WAITS, age_s=0.1)])
    ranks.waiting([WAITS])
    assert asked[-1] == [0], "a rank that has made progress since is asked again"


def test_a_wait_for_data_is_reported_once_and_again_in_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(
        diagnosis, "ask_for_stacks", lambda folder, ranks, signal_to: dict.fromkeys(ranks, "stack")
    )
    starter = launcher_of(tmp_path, monkeypatch, logged)
    for number in (1, 2):
        group = starter.start(Round(number, TWO_RANKS, -1), 0)
        group._diagnosis.report_stalls([WAITS, READS])
        group._diagnosis.report_stalls([WAITS, READS])
        assert len(logged) == number
        assert logged[-1].startswith("rank 1 (process 12) makes no progress in phase DATA after step 20")
        assert len(list((tmp_path / "stacks").glob(f"round-{number:06d}-*"))) == 2


def test_a_round_starts_without_the_files_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starter = launcher_of(tmp_path, monkeypatch, [])
    first = starter.start(Round(1, TWO_RANKS, -1), 0)
    (tmp_path / "round-000001" / "verdict-00000.json").write_text("{}")
    second = starter.start(Round(1, TWO_RANKS, -1), 0)
    assert first._mark != second._mark
    assert second._files.heartbeats() == {}
    assert second._files.verdicts() == {0: None, 1: None}


def test_a_full_disk_loses_the_stacks_and_nothing_else(tmp_path: Path) -> None:
    logged: list[str] = []
    with small_disk(tmp_path / "disk", 2**20) as disk:
        fill(disk)
        StackArchive(disk / "run/stacks", 1, logged.append).write({0: "stack"})
    assert len(logged) == 1
    assert logged[0].startswith("ALARM: cannot keep the stacks of ranks in ")
    assert logged[0].endswith("No space left on device")
