"""Deadlines of ranks and blame among nodes, on clocks that the tests set."""

import faulthandler
import os
import random
import signal
from pathlib import Path

import pytest

from dit_scale import heartbeat
from dit_scale.elastic.board import Board, Ending, Member, Reason, Round
from dit_scale.elastic.hearing import Hearing
from dit_scale.elastic.node.deadlines import Deadlines, Standing, culprit, standings
from dit_scale.elastic.node.group import GroupOutcome
from dit_scale.elastic.node.stacks import STACK_SIGNAL, ask_for_stacks, is_in_collective, stack_path
from dit_scale.elastic.supervisor import fruitless_after
from dit_scale.heartbeat import Beat, Heart, Phase, beat_path, read_beat

QUICK_S, SLOW_S = 0.02, 7.0
SECTIONS = (Phase.DATA, Phase.COMPUTE, Phase.AGREE, Phase.LOG)


def test_no_false_alarm_in_ten_thousand_quick_steps_with_slow_ones_strewn_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(heartbeat.time, "monotonic_ns", lambda: int(now_s * 1e9))
    draws = random.Random(0)
    heart = Heart(0, str(tmp_path))
    slow = 0
    for step in range(10_000):
        for section in SECTIONS:
            heart.beat(section, step)
            is_slow = draws.random() < 0.0005
            slow += is_slow
            now_s += SLOW_S if is_slow else QUICK_S * draws.random()
            (one,) = standings({0: read_beat(beat_path(tmp_path, 0))}, {0: None}, Deadlines(), now_s, 100.0)
            assert not one.is_overdue, f"{one}"
    assert slow > 10
    now_s += 8.1
    (one,) = standings({0: read_beat(beat_path(tmp_path, 0))}, {0: None}, Deadlines(), now_s, 100.0)
    assert one.is_overdue


def test_the_deadline_of_a_step_holds_as_soon_as_sixteen_were_measured(tmp_path: Path) -> None:
    heart = Heart(0, str(tmp_path))
    known = []
    for step in range(20):
        heart.beat(Phase.COMPUTE, step)
        beat = read_beat(beat_path(tmp_path, 0))
        assert beat is not None
        known.append(beat.p99_s > 0)
    assert known == [False] * 17 + [True] * 3  # the first step, which may compile, is not among them


def test_the_way_back_to_an_earlier_step_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback takes ten minutes: what a step may take stays what it was."""
    now_s = 100.0
    monkeypatch.setattr(heartbeat.time, "monotonic_ns", lambda: int(now_s * 1e9))
    heart = Heart(0, str(tmp_path))
    for steps, pause_s in ((range(30), 0.0), (range(12, 60), 600.0)):
        now_s += pause_s
        for step in steps:
            now_s += 1.0
            heart.beat(Phase.COMPUTE, step)
    beat = read_beat(beat_path(tmp_path, 0))
    assert beat is not None
    assert beat.p99_s == 1.0


@pytest.mark.parametrize(("num_slow", "p99_s"), [(9, 1.0), (10, 9.0)])
def test_the_99th_percentile_is_of_the_last_thousand_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_slow: int, p99_s: float
) -> None:
    now_s = 100.0
    monkeypatch.setattr(heartbeat.time, "monotonic_ns", lambda: int(now_s * 1e9))
    heart = Heart(0, str(tmp_path))
    for step in range(1, 1521):  # the last thousand end with the slow ones
        now_s += 600.0 if step < 500 else 9.0 if step > 1520 - num_slow else 1.0
        heart.beat(Phase.COMPUTE, step)
    beat = read_beat(beat_path(tmp_path, 0))
    assert beat is not None
    assert beat.p99_s == p99_s


def test_slow_steps_have_a_deadline_that_is_three_times_as_long() -> None:
    beat = Beat(os.getpid(), Phase.COMPUTE, 50, at_s=0.0, p99_s=20.0)
    (early,) = standings({0: beat}, {0: None}, Deadlines(), 57.0, 0.0)
    (late,) = standings({0: beat}, {0: None}, Deadlines(), 58.5, 0.0)
    assert (early.is_overdue, late.is_overdue) == (False, True)


def test_a_rank_that_never_says_a_word_is_found() -> None:
    (one,) = standings({3: None}, {3: None}, Deadlines(start_s=900), now_s=1901.0, began_s=1000.0)
    assert (one.rank, one.is_overdue) == (3, True)


def test_the_culprit_is_the_one_that_the_others_wait_for() -> None:
    waiting = Standing(0, 10, Phase.COMPUTE, 7, age_s=9.0, limit_s=8.0)
    behind = Standing(1, 11, Phase.DATA, 7, age_s=8.9, limit_s=300.0)
    stopped = Standing(2, 12, Phase.AGREE, 7, age_s=8.5, limit_s=8.0, stopped=True)
    assert culprit([waiting, behind]) == behind
    assert culprit([waiting, behind, stopped]) == stopped


def test_in_the_same_section_the_culprit_is_the_one_outside_of_the_collective() -> None:
    inside = Standing(0, 10, Phase.COMPUTE, 7, age_s=9.0, limit_s=8.0, waits=True)
    outside = Standing(1, 11, Phase.COMPUTE, 7, age_s=8.9, limit_s=8.0)
    assert culprit([inside, outside]) == outside
    assert "rank 0 (process 10) waits for other ranks in COMPUTE of step 7" in str(inside)


@pytest.mark.parametrize(
    ("section", "age_s", "overdue"),
    [
        (Phase.RESTORE, 599.0, False),
        (Phase.RESTORE, 601.0, True),
        (Phase.RESTORED, 3599.0, False),
        (Phase.WAIT_SAVE, 119.0, False),
        (Phase.WAIT_SAVE, 121.0, True),
    ],
)
def test_beside_the_steps_a_beat_may_be_old(section: Phase, age_s: float, overdue: bool) -> None:
    beat = Beat(os.getpid(), section, 0, at_s=0.0)
    (one,) = standings({0: beat}, {0: None}, Deadlines(), age_s, 0.0)
    assert one.is_overdue == overdue


def test_who_has_read_its_part_is_not_blamed_for_who_stands_still_in_reading() -> None:
    read = Standing(0, 10, Phase.RESTORED, 0, age_s=900.0, limit_s=3600.0)
    reading = Standing(1, 11, Phase.RESTORE, 0, age_s=601.0, limit_s=600.0)
    assert culprit([read, reading]) == reading


def test_stacks_are_asked_for_and_read_from_where_the_last_ones_ended(tmp_path: Path) -> None:
    asked = []

    def signal_to(rank: int) -> None:
        asked.append(rank)
        if rank == 0:  # rank 1 does not answer
            signal.raise_signal(STACK_SIGNAL)

    with stack_path(tmp_path, 0).open("w") as file:
        faulthandler.register(STACK_SIGNAL, file)
        try:
            first = ask_for_stacks(tmp_path, [0], signal_to)
            second = ask_for_stacks(tmp_path, [0, 1], signal_to)
        finally:
            faulthandler.unregister(STACK_SIGNAL)
    assert asked == [0, 0, 1]
    for found in (first, second):
        assert found.keys() == {0}
        assert found[0].count("in signal_to") == 1
        assert not is_in_collective(found[0])


def test_a_collective_is_seen_in_a_stack() -> None:
    gather = """\
Thread 0x00007f (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3116 in all_reduce
  File "/x/site-packages/deepspeed/comm/torch.py", line 166 in all_reduce
  File "/x/dit_scale/train/engine.py", line 1 in backward
"""
    assert is_in_collective(gather)
    assert is_in_collective(gather.replace("/torch/distributed/distributed_c10d.py", "/dit_scale/dist.py"))
    assert not is_in_collective("\n".join(gather.splitlines()[3:]))


ROUND = Round(1, tuple(Member(node, node, "", 0, 1, "") for node in "abc"), committed_step=5)
BROKEN = GroupOutcome(Reason.FAILED, "rank 0: RuntimeError: Connection closed by peer", first_hand=False)


def test_a_rank_that_waits_for_data_of_another_node_is_no_alarm(board: Board) -> None:
    waiting = Standing(0, 10, Phase.COMPUTE, 7, age_s=9.0, limit_s=8.0)
    reading = Standing(1, 11, Phase.DATA, 7, age_s=9.0, limit_s=300.0)
    at = Hearing(board, ROUND, "a", patience_s=5.0)
    at.say(GroupOutcome(Reason.HUNG, "", first_hand=False), (waiting,))
    assert at.judge(0.0) is None, "the others were not heard"
    for node in "bc":
        Hearing(board, ROUND, node, 5.0).say(None, (reading,))
    assert at.judge(1.0) is None, "reading may take longer"
    outcome = at.judge(295.0)
    assert outcome is not None
    assert (outcome.reason, outcome.node, outcome.details["rank"]) == (Reason.HUNG, "b", 1)


def test_what_gets_on_again_is_taken_back(board: Board) -> None:
    at = Hearing(board, ROUND, "a", 5.0)
    at.say(None, (Standing(0, 10, Phase.COMPUTE, 7, 9.0, 30.0),))
    assert list(board.reports(1)) == ["a"]
    at.say(None, ())
    assert board.reports(1) == {}


def test_ranks_that_break_off_everywhere_blame_no_node(board: Board) -> None:
    for node in "abc":
        Hearing(board, ROUND, node, 5.0).say(BROKEN, ())
    outcome = Hearing(board, ROUND, "a", 5.0).judge(0.0)
    assert outcome is not None
    assert outcome.reason == Reason.FAILED
    assert outcome.text.startswith("no rank says why: a: rank 0")


@pytest.mark.parametrize("renews", [True, False])
def test_a_silent_node_is_lost_when_its_lease_stands_still(board: Board, renews: bool) -> None:
    board.renew_lease("c", 4)
    for node in "ab":
        Hearing(board, ROUND, node, 5.0).say(BROKEN, ())
    at = Hearing(board, ROUND, "a", 5.0)
    assert at.judge(0.0) is None
    assert at.judge(1.5) is None
    if renews:
        board.renew_lease("c", 5)
    outcome = at.judge(5.5)
    assert outcome is not None
    assert (outcome.reason, outcome.node) == ((Reason.FAILED, "") if renews else (Reason.LOST, "c"))


@pytest.mark.parametrize(
    ("reason", "committed_step", "count"),
    [
        (Reason.FAILED, 5, 3),
        (Reason.HUNG, 5, 3),
        (Reason.LOST, 5, 2),
        (Reason.FAILED, 6, 0),
        (Reason.GROWING, 6, 0),
    ],
)
def test_failures_count_until_there_is_a_newer_checkpoint(
    reason: Reason, committed_step: int, count: int
) -> None:
    round_ = Round(9, ROUND.members, committed_step=5, fruitless=2)
    assert fruitless_after(round_, Ending(9, reason, "a", "", committed_step)) == count
