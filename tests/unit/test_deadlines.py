"""Deadlines of ranks, and which rank or node is at fault, on clocks that the tests set."""

import faulthandler
import itertools
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from dit_scale import heartbeat
from dit_scale.elastic.board import Board, Ending, Reason, Round
from dit_scale.elastic.giving_up import fruitless_after
from dit_scale.elastic.hearing import Hearing
from dit_scale.elastic.node.deadlines import Deadlines, Standing, culprit, standings_of
from dit_scale.elastic.node.outcomes import GroupOutcome
from dit_scale.elastic.node.stacks import STACK_SIGNAL, ask_for_stacks, is_in_collective, stack_path
from dit_scale.heartbeat import Beat, Heart, Phase, beat_path, read_beat
from tests.support.nodes.members import member_of

QUICK_S, SLOW_S = 0.02, 7.0
PHASES = (Phase.DATA, Phase.COMPUTE, Phase.AGREE, Phase.LOG)


def standing_of(beat: Beat | None, now_s: float, since_s: float = 0.0) -> Standing:
    """Where rank 0 stands, whose process is not stopped."""
    (one,) = standings_of(
        {0: beat}, {0: None}, Deadlines(), now_s=now_s, since_s=since_s, is_stopped=lambda pid: False
    )
    return one


def in_step_7(rank: int, phase: Phase = Phase.COMPUTE, *, age_s: float = 9.0, **more: Any) -> Standing:
    """Standing of a rank that is overdue after 8 s unless the test says otherwise."""
    return Standing(rank=rank, pid=10 + rank, phase=phase, step=7, age_s=age_s, **{"limit_s": 8.0} | more)


def test_ten_thousand_quick_steps_and_some_slow_ones_cause_no_false_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(heartbeat.time, "monotonic_ns", lambda: int(now_s * 1e9))
    draws = random.Random(0)
    heart = Heart(0, str(tmp_path))
    slow = 0
    for step in range(10_000):
        for phase in PHASES:
            heart.beat(phase, step)
            is_slow = draws.random() < 0.0005
            slow += is_slow
            now_s += SLOW_S if is_slow else QUICK_S * draws.random()
            one = standing_of(read_beat(beat_path(tmp_path, 0)), now_s, since_s=100.0)
            assert not one.is_overdue, f"{one}"
    assert slow > 10
    now_s += 8.1
    one = standing_of(read_beat(beat_path(tmp_path, 0)), now_s, since_s=100.0)
    assert one.is_overdue


def test_the_deadline_of_a_step_applies_once_sixteen_steps_are_measured(tmp_path: Path) -> None:
    heart = Heart(0, str(tmp_path))
    known = []
    for step in range(20):
        heart.beat(Phase.COMPUTE, step)
        beat = read_beat(beat_path(tmp_path, 0))
        assert beat is not None
        known.append(beat.p99_s > 0)
    assert known == [False] * 17 + [True] * 3  # the first step, which may compile, does not count


def test_a_rollback_does_not_count_as_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback takes ten minutes; the deadline of a step stays the same."""
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
def test_the_99th_percentile_covers_the_last_thousand_steps(
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
    assert not standing_of(beat, 57.0).is_overdue
    assert standing_of(beat, 58.5).is_overdue


def test_a_rank_that_never_sends_a_heartbeat_is_overdue() -> None:
    assert not standing_of(None, now_s=1899.0, since_s=1000.0).is_overdue
    assert standing_of(None, now_s=1901.0, since_s=1000.0).is_overdue


def test_a_stopped_process_gets_no_longer_than_a_step() -> None:
    beat = Beat(4711, Phase.RESTORE, 0, at_s=0.0)
    stopped, running = (
        standings_of({0: beat}, {0: None}, Deadlines(), now_s=9.0, since_s=0.0, is_stopped=is_stopped)[0]
        for is_stopped in ({4711}.__contains__, set[int]().__contains__)
    )
    assert stopped.is_overdue
    assert not running.is_overdue
    assert "rank 0 (process 4711) is stopped in phase RESTORE before its first step" in str(stopped)


def test_the_culprit_is_the_rank_that_the_others_wait_for() -> None:
    waiting = in_step_7(0)
    behind = in_step_7(1, Phase.DATA, age_s=8.9, limit_s=300.0)
    stopped = in_step_7(2, Phase.AGREE, age_s=8.5, stopped=True)
    assert culprit([waiting, behind]) == behind
    assert culprit([waiting, behind, stopped]) == stopped


def test_in_the_same_phase_the_culprit_is_outside_the_collective() -> None:
    inside, outside = in_step_7(0, waits=True), in_step_7(1, age_s=8.9)
    assert culprit([inside, outside]) == outside
    assert "rank 0 (process 10) is waiting for other ranks in phase COMPUTE after step 7" in str(inside)


@pytest.mark.parametrize("waits", [True, False])
def test_among_equals_the_culprit_has_the_oldest_heartbeat(waits: bool) -> None:
    ranks = [in_step_7(rank, age_s=age_s, waits=waits) for rank, age_s in enumerate((9.0, 9.5, 8.5))]
    for order in itertools.permutations(ranks):
        assert culprit(order).rank == 1


@pytest.mark.parametrize(
    ("phase", "age_s", "overdue"),
    [
        (Phase.RESTORE, 599.0, False),
        (Phase.RESTORE, 601.0, True),
        (Phase.RESTORED, 3599.0, False),
        (Phase.WAIT_SAVE, 119.0, False),
        (Phase.WAIT_SAVE, 121.0, True),
    ],
)
def test_phases_outside_of_steps_have_longer_deadlines(phase: Phase, age_s: float, overdue: bool) -> None:
    beat = Beat(os.getpid(), phase, 0, at_s=0.0)
    assert standing_of(beat, age_s).is_overdue == overdue


def test_a_rank_that_hangs_while_reading_is_blamed_before_one_that_has_read_its_part() -> None:
    read = in_step_7(0, Phase.RESTORED, age_s=900.0, limit_s=3600.0)
    reading = in_step_7(1, Phase.RESTORE, age_s=601.0, limit_s=600.0)
    assert culprit([read, reading]) == reading


def test_each_request_returns_only_the_new_stacks(tmp_path: Path) -> None:
    asked = []

    def signal_to(rank: int) -> None:
        asked.append(rank)
        if rank == 0:  # rank 1 does not respond
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


def test_a_stack_shows_a_collective() -> None:
    gather = """\
Thread 0x00007f (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3116 in all_reduce
  File "/x/site-packages/deepspeed/comm/torch.py", line 166 in all_reduce
  File "/x/dit_scale/train/engine.py", line 1 in backward
"""
    assert is_in_collective(gather)
    assert is_in_collective(gather.replace("/torch/distributed/distributed_c10d.py", "/dit_scale/dist.py"))
    assert not is_in_collective("\n".join(gather.splitlines()[3:]))


ROUND = Round(1, tuple(member_of(node) for node in "abc"), committed_step=5)
BROKEN = GroupOutcome(Reason.FAILED, "rank 0: RuntimeError: Connection closed by peer", first_hand=False)


def test_a_rank_that_waits_for_data_on_another_node_gets_its_own_deadline(board: Board) -> None:
    waiting = in_step_7(0)
    reading = in_step_7(1, Phase.DATA, limit_s=300.0)
    at = Hearing(board, ROUND, "a", patience_s=5.0)
    at.report(GroupOutcome(Reason.HUNG, "", first_hand=False), (waiting,))
    assert at.judge(0.0) is None, "the other nodes have not reported"
    for node in "bc":
        Hearing(board, ROUND, node, 5.0).report(None, (reading,))
    assert at.judge(1.0) is None, "reading may take longer"
    outcome = at.judge(295.0)
    assert outcome is not None
    assert (outcome.reason, outcome.node, outcome.details["rank"]) == (Reason.HUNG, "b", 1)


def test_a_report_is_taken_back_when_the_ranks_make_progress_again(board: Board) -> None:
    at = Hearing(board, ROUND, "a", 5.0)
    at.report(None, (in_step_7(0, limit_s=30.0),))
    assert board.reports(1)["a"]["ranks"][0]["section"] == Phase.COMPUTE, "the key of the files"
    assert list(board.reports(1)) == ["a"]
    at.report(None, ())
    assert board.reports(1) == {}


def test_second_hand_failures_on_all_nodes_blame_no_node(board: Board) -> None:
    for node in "abc":
        Hearing(board, ROUND, node, 5.0).report(BROKEN, ())
    outcome = Hearing(board, ROUND, "a", 5.0).judge(0.0)
    assert outcome is not None
    assert outcome.reason == Reason.FAILED
    assert outcome.text.startswith("cause unknown: a: rank 0")


@pytest.mark.parametrize("renews", [True, False])
def test_a_silent_node_is_lost_unless_it_renews_its_lease(board: Board, renews: bool) -> None:
    board.renew_lease("c", 4)
    for node in "ab":
        Hearing(board, ROUND, node, 5.0).report(BROKEN, ())
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
