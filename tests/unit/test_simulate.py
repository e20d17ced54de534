"""The simulator: known answers, exact sums, and the same history whether or not polls are skipped."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from dit_scale.elastic.board import Reason
from dit_scale.elastic.hearing import JUDGES
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.policy import Policy
from dit_scale.forecast.estimate import Machines, Work, best_every_steps, daly_s, estimate
from dit_scale.forecast.simulate import DAY_S, Failure, SimulationResult, SimulationSetup, poisson, simulate
from dit_scale.forecast.timeline import SECOND, Costs, FailureKind
from dit_scale.ledger import Heading

SHARES = {FailureKind.CRASH: 0.4, FailureKind.HANG: 0.2, FailureKind.LOSS: 0.4}
ALL = dict.fromkeys(FailureKind, 1 / len(FailureKind))
COSTS = Costs(
    step_s=1.0,
    save_stall_s=2.0,
    commit_lag_s=5.0,
    launch_s=16.0,
    init_s=8.0,
    restore_s=4.0,
    first_step_s=4.0,
)
START_S = 16 + 8 + 4
"""Duration of the first start, which restores nothing."""
POLLS_S = 1.0
"""Tolerance: a change takes a few polls of 0.25 s each."""
NODES = 4
SMALL = SimulationSetup(nodes=NODES, steps=1000, every_steps=100, costs=COSTS, policy=Policy(min_nodes=2))


def assert_exact(result: SimulationResult) -> None:
    assert sum(result.ledger.spent.values()) == result.wall_s * SECOND
    assert min(result.ledger.spent.values()) >= 0


def test_without_failures_only_saves_cost_goodput() -> None:
    result = simulate(SMALL)
    assert result.code == Exit.DONE
    assert result.endings == Counter({Reason.DONE: 1})
    # Nine saves on the way, and the wait for the commit of the last step.
    assert result.ledger.spent[Heading.PRODUCTIVE] == 1000 * SECOND
    assert result.ledger.spent[Heading.CHECKPOINT] == (9 * 2 + 5) * SECOND
    assert (
        result.ledger.spent[Heading.RESTORE]
        == result.ledger.spent[Heading.REPLAYED]
        == result.ledger.spent[Heading.DEGRADED]
        == 0
    )
    assert result.wall_s == pytest.approx(START_S + 1000 + 23, abs=POLLS_S)
    assert_exact(result)


def test_goodput_of_a_long_run_is_one_minus_the_share_of_stalls() -> None:
    costs = replace(COSTS, launch_s=0, init_s=0, first_step_s=0, commit_lag_s=2.0)
    result = simulate(replace(SMALL, steps=100_000, costs=costs))
    assert result.goodput == pytest.approx(100 / 102, abs=POLLS_S / 102_000)
    assert result.goodput == 1 - result.ledger.seconds(*set(Heading) - {Heading.PRODUCTIVE}) / result.wall_s


def test_a_killed_rank_costs_what_was_not_committed_and_a_restart() -> None:
    # 250.5 s into the training. Saves started after 100 s and 202 s, so 200 steps are committed.
    start_s = 0.25 + START_S
    result = simulate(SMALL, [Failure(start_s + 250.5, 2, FailureKind.CRASH)])
    assert result.code == Exit.DONE
    assert result.endings == Counter({Reason.FAILED: 1, Reason.DONE: 1})
    assert result.failures == Counter({FailureKind.CRASH: 1})
    assert result.ledger.seconds(Heading.REPLAYED) == pytest.approx(250.5 - 204, abs=POLLS_S)
    assert result.ledger.seconds(Heading.DETECT) <= 0.25
    assert result.ledger.seconds(Heading.RESTORE) == 4.0
    assert result.ledger.seconds(Heading.RESTART) == pytest.approx(2 * START_S, abs=POLLS_S)
    assert result.ledger.spent[Heading.DEGRADED] == 0
    assert result.ledger.spent[Heading.PRODUCTIVE] == 1000 * SECOND
    assert_exact(result)


def test_steps_are_lost_if_their_save_has_started_but_not_committed() -> None:
    start_s = 0.25 + START_S
    committed = simulate(SMALL, [Failure(start_s + 208, 2, FailureKind.CRASH)])
    in_flight = simulate(SMALL, [Failure(start_s + 206, 2, FailureKind.CRASH)])
    assert committed.ledger.seconds(Heading.REPLAYED) == pytest.approx(208 - 204, abs=POLLS_S)
    assert in_flight.ledger.seconds(Heading.REPLAYED) == pytest.approx(100 + 206 - 204, abs=POLLS_S)


def test_a_hang_is_detected_by_its_deadline() -> None:
    result = simulate(SMALL, [Failure(START_S + 250, 1, FailureKind.HANG)])
    assert result.endings == Counter({Reason.HUNG: 1, Reason.DONE: 1})
    assert 7.5 < result.ledger.seconds(Heading.DETECT) < 10
    # Steps of 10 s have a deadline of 30 s, minus the time to poll and to hear the other nodes.
    slow = replace(SMALL, costs=replace(COSTS, step_s=10.0))
    result = simulate(slow, [Failure(START_S + 2500, 1, FailureKind.HANG)])
    assert 27.5 < result.ledger.seconds(Heading.DETECT) < 30


def test_a_stopped_rank_is_detected_even_before_its_steps_were_measured() -> None:
    for since_s in (5.0, 250.0):
        result = simulate(SMALL, [Failure(START_S + since_s, 1, FailureKind.STOP)])
        assert result.endings == Counter({Reason.HUNG: 1, Reason.DONE: 1})
        assert 7.5 < result.ledger.seconds(Heading.DETECT) < 10


def test_a_killed_supervisor_is_detected_after_the_other_ranks_fail_and_all_nodes_are_heard() -> None:
    patience_s = SMALL.policy.lease_s / 2
    setup = replace(SMALL, spares=1, costs=replace(COSTS, break_s=3.0))
    result = simulate(setup, [Failure(START_S + 250, 1, FailureKind.DEATH)])
    assert result.endings == Counter({Reason.LOST: 1, Reason.DONE: 1})
    assert result.ledger.seconds(Heading.DETECT) == pytest.approx(3.0 + patience_s, abs=POLLS_S)
    # During imports no collective can fail yet, so the lease has to expire.
    result = simulate(setup, [Failure(START_S / 2, 1, FailureKind.DEATH)])
    assert result.endings == Counter({Reason.LOST: 1, Reason.DONE: 1})
    assert result.ledger.seconds(Heading.DETECT) == pytest.approx(SMALL.policy.lease_s, abs=POLLS_S)


@pytest.mark.parametrize("polls", [True, False])
def test_the_standby_node_ends_a_round_whose_members_are_all_lost(polls: bool) -> None:
    setup = replace(SMALL, nodes=2, spares=1, policy=Policy(), polls=polls)
    failures = [Failure(START_S + 250, node, FailureKind.LOSS) for node in (0, 1)]
    result = simulate(setup, failures)
    assert result.endings == Counter({Reason.LOST: 1, Reason.DONE: 1})
    # First the lease of the watched node expires, then those of all others.
    assert result.ledger.seconds(Heading.DETECT) == pytest.approx(2 * SMALL.policy.lease_s, abs=POLLS_S)


def test_measured_durations_take_precedence() -> None:
    failures = [Failure(START_S + 250, 1, FailureKind.LOSS)]
    alike = simulate(replace(SMALL, measured={3: COSTS}), failures)
    quicker = simulate(replace(SMALL, measured={3: replace(COSTS, step_s=0.5)}), failures)
    assert alike.ledger.spent[Heading.DEGRADED] == quicker.ledger.spent[Heading.DEGRADED] == 0
    assert alike.ledger.spent[Heading.PRODUCTIVE] == 1000 * SECOND
    assert quicker.ledger.spent[Heading.PRODUCTIVE] == 600 * SECOND
    for result in (alike, quicker):
        assert_exact(result)


def test_a_lost_node_is_detected_by_its_lease() -> None:
    result = simulate(replace(SMALL, spares=1), [Failure(START_S + 250, 1, FailureKind.LOSS)])
    assert result.endings == Counter({Reason.LOST: 1, Reason.DONE: 1})
    assert 15 < result.ledger.seconds(Heading.DETECT) < 16
    # The standby node takes over immediately.
    assert result.ledger.spent[Heading.DEGRADED] == 0
    assert result.ledger.seconds(Heading.WAITING) < 2


def test_without_a_standby_node_the_run_continues_more_slowly_and_grows_again() -> None:
    away = simulate(replace(SMALL, repair_s=DAY_S), [Failure(START_S + 250, 1, FailureKind.LOSS)])
    assert away.endings == Counter({Reason.LOST: 1, Reason.DONE: 1})
    # 800 steps on three nodes of four take a third longer.
    assert away.ledger.seconds(Heading.DEGRADED) == pytest.approx(800 / 3, rel=1e-6)
    back = simulate(replace(SMALL, repair_s=300.0), [Failure(START_S + 250, 1, FailureKind.LOSS)])
    assert back.endings == Counter({Reason.LOST: 1, Reason.GROWING: 1, Reason.DONE: 1})
    assert 50 < back.ledger.seconds(Heading.DEGRADED) < 200
    for result in (away, back):
        assert result.committed_step == 1000
        assert_exact(result)


def test_failures_of_standby_nodes_cost_nothing() -> None:
    setup = replace(SMALL, spares=1)
    calm = simulate(setup)
    stormy = simulate(setup, [Failure(300, 4, FailureKind.CRASH), Failure(400, 4, FailureKind.LOSS)])
    assert stormy.failures.total() == 2
    assert stormy.endings == calm.endings
    assert stormy.ledger.spent | {Heading.WAITING: 0} == calm.ledger.spent | {Heading.WAITING: 0}


def test_supervisors_give_up_on_a_run_that_makes_no_progress() -> None:
    # A rank dies in every round before the first commit.
    failures = [Failure(60.0 * i, 0, FailureKind.CRASH) for i in range(1, 100)]
    result = simulate(SMALL, failures)
    assert result.code == Exit.DO_NOT_RESTART
    assert result.committed_step == -1
    assert result.ledger.spent[Heading.PRODUCTIVE] == 0
    assert_exact(result)


def stormy(seed: int, polls: bool, nodes: int = 5) -> SimulationResult:
    setup = replace(SMALL, nodes=nodes, spares=1, steps=1000, repair_s=400.0, polls=polls)
    return simulate(setup, poisson(nodes + 1, 240_000 / (nodes + 1), ALL, seed))


@pytest.mark.parametrize(("seed", "nodes"), [(0, 5), (1, 5), (3, 5), (3, JUDGES + 4)])
def test_skipped_polls_change_nothing(seed: int, nodes: int) -> None:
    quick, slow = stormy(seed, polls=False, nodes=nodes), stormy(seed, polls=True, nodes=nodes)
    assert quick.failures.total() > 3
    assert quick == slow
    assert_exact(quick)


def test_the_seed_fixes_the_history() -> None:
    assert stormy(5, polls=False) == stormy(5, polls=False)
    assert stormy(5, polls=False) != stormy(6, polls=False)


def test_failures_have_the_requested_rate() -> None:
    # 1,000 nodes fail 6.5 times a day; for 10,000 failures the standard error is 1 %.
    failures = list(islice(poisson(1000, 6.5, SHARES, seed=1), 10_000))
    assert failures[-1].at_s / DAY_S == pytest.approx(10_000 / 6.5, rel=0.04)
    kinds = Counter(failure.kind for failure in failures)
    assert kinds[FailureKind.CRASH] / 10_000 == pytest.approx(0.4, abs=0.02)
    assert {failure.node for failure in failures} == set(range(1000))


MACHINES = Machines(
    8,
    spares=2,
    failures_per_1000_node_days=800.0,
    crash_share=0.4,
    hang_share=0.2,
    loss_share=0.4,
    repair_s=3600.0,
)


def mean_goodput(every_steps: int, costs: Costs, seeds: int) -> float:
    setup = SimulationSetup(
        nodes=8,
        spares=2,
        steps=400_000,
        every_steps=every_steps,
        costs=costs,
        policy=Policy(min_nodes=4, max_fruitless=100),
        repair_s=3600.0,
    )
    runs = [simulate(setup, poisson(10, 800.0, SHARES, seed)) for seed in range(seeds)]
    assert {run.code for run in runs} == {Exit.DONE}
    return sum(run.goodput for run in runs) / seeds


def test_the_best_interval_is_dalys() -> None:
    costs = Costs(save_stall_s=20.0, commit_lag_s=20.0)
    best = round(daly_s(20.0, MACHINES.mtbf_s))
    seldom, right, often = (mean_goodput(every, costs, seeds=2) for every in (4 * best, best, best // 4))
    assert right - seldom > 0.01
    assert right - often > 0.01


@pytest.mark.parametrize("stall_s", [0.5, 20.0])
def test_formula_and_simulation_agree(stall_s: float) -> None:
    costs = Costs(save_stall_s=stall_s, commit_lag_s=20.0)
    every = best_every_steps(MACHINES, costs)
    expected = estimate(MACHINES, Work(400_000, every, costs)).goodput
    assert mean_goodput(every, costs, seeds=2) == pytest.approx(expected, abs=0.01)


def test_a_returning_node_waits_for_members_whose_save_takes_longer_than_settling() -> None:
    """Otherwise it would start a round alone while the others save, and the run would have to grow again."""
    setup = SimulationSetup(
        nodes=NODES, steps=1000, every_steps=100, costs=replace(COSTS, commit_lag_s=20.0), repair_s=300.0
    )
    result = simulate(setup, [Failure(300.0, 3, FailureKind.LOSS)])
    assert result.endings == Counter({Reason.LOST: 1, Reason.GROWING: 1, Reason.DONE: 1})
    assert_exact(result)
