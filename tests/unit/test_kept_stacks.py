"""Stacks of ranks that stand still: those that tell where they stood are kept, also when they have ended."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from dit_scale.elastic.board import Member, Round
from dit_scale.elastic.node import group
from dit_scale.elastic.node.deadlines import Deadlines, Standing
from dit_scale.heartbeat import Phase
from tests.support.faults.small_disk import fill, small_disk

WAITS = Standing(rank=0, pid=11, section=Phase.COMPUTE, step=20, age_s=9.0, limit_s=8.0, quiet_s=8.0)
READS = Standing(rank=1, pid=12, section=Phase.DATA, step=20, age_s=9.0, limit_s=310.0, quiet_s=8.0)


def test_ranks_are_asked_once_for_each_place_and_the_last_answer_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def ask(folder: Path, ranks: Iterable[int], signal_to: Callable[[int], None]) -> dict[int, str]:
        asked.append(list(ranks))
        return {rank: f"answer {len(asked)}" for rank in asked[-1]}

    monkeypatch.setattr(group, "ask_for_stacks", ask)
    ranks = group.LaunchedGroup([], tmp_path, Deadlines(), stacks=tmp_path / "stacks")
    ranks._waiting([WAITS, READS])
    ranks._waiting([WAITS, READS])
    assert asked == [[0, 1]]
    ranks._waiting([WAITS, replace(READS, section=Phase.COMPUTE)])
    assert asked == [[0, 1]] * 2

    ranks._waiting([])  # another node has ended its ranks, and these broke off
    ranks.keep_stacks()
    kept = [path.read_text() for path in sorted((tmp_path / "stacks").iterdir())]
    assert kept == ["answer 2", "answer 2"]

    ranks._waiting([replace(WAITS, age_s=0.1)])
    ranks._waiting([WAITS])
    assert asked[-1] == [0], "who got on since is asked anew"


def test_a_wait_for_data_is_named_once_and_anew_in_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        group, "ask_for_stacks", lambda folder, ranks, signal_to: dict.fromkeys(ranks, "stack")
    )
    monkeypatch.setattr(group.subprocess, "Popen", lambda *command, **more: None)
    ranks = group.LaunchedGroup([], tmp_path, Deadlines(), stacks=tmp_path / "stacks", say=said.append)
    for number in (1, 2):
        ranks.start(Round(number, (Member("a", "boot", "", 1, 2, "digest"),), -1), 0)
        ranks._note_stalled([WAITS, READS])
        ranks._note_stalled([WAITS, READS])
        assert len(said) == number
        assert said[-1].startswith("rank 1 (process 12) does not get on in DATA of step 20")
        assert len(list((tmp_path / "stacks").glob(f"round-{number:06d}-*"))) == 2


def test_stacks_that_cannot_be_kept_end_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk", 2**20) as disk:
        fill(disk)
        ranks = group.LaunchedGroup([], tmp_path, Deadlines(), stacks=disk / "run/stacks", say=said.append)
        ranks._write_down({0: "stack"})
    assert len(said) == 1
    assert said[0].startswith("ALARM: the stacks of ranks cannot be kept in ")
    assert said[0].endswith("No space left on device")
