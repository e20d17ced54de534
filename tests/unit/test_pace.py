"""Speed, waits and memory between two log points: what a rank marks, and what all ranks make of it."""

from dataclasses import replace
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.telemetry import clock
from dit_scale.telemetry.pace import GIB, TIMED_KEYS, Pace, RankFigures, Work, over_ranks

WORK = Work(global_batch=8, flops_per_image=1e9, flops_per_s=1e12)
FIGURES = RankFigures(
    steps=4,
    window_s=10.0,
    step_s_p50=2.0,
    step_s_p99=3.0,
    own_s=5.0,
    waited_s=1.0,
    memory_bytes=GIB,
    peak_memory_bytes=2 * GIB,
)


class Clocks:
    """Both clocks of the host, at a time that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(clock.time, "monotonic", lambda: self.now_s)

    def step(self, pace: Pace, *micro_steps: tuple[float, float, float]) -> None:
        """Take a step; each micro-step has the seconds of wait, forward pass and the rest."""
        for wait_s, forward_s, rest_s in micro_steps:
            pace.waits()
            self.now_s += wait_s + forward_s
            pace.computed("batch", "losses")
            self.now_s += rest_s
        pace.finished()


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


def test_a_rank_measures_its_steps_and_its_own_work(clocks: Clocks) -> None:
    pace = Pace(torch.device("cpu"))
    clocks.now_s += 8.0  # the loader starts
    clocks.step(pace, (0.5, 1.0, 2.0), (0.0, 1.0, 2.0))
    clocks.now_s += 3.5  # a save
    clocks.step(pace, (0.5, 2.0, 4.0), (0.0, 2.0, 4.0))
    found = pace.take(waited_s=1.0)
    assert (found.steps, found.window_s, found.own_s, found.waited_s) == (2, 30.5, 7.0, 1.0)
    assert (found.step_s_p50, found.step_s_p99) == (11.25, pytest.approx(6.5 + 0.99 * 9.5))
    assert 0 < found.memory_bytes <= found.peak_memory_bytes

    clocks.now_s += 2.0  # the log point is no step, but part of the window
    clocks.step(pace, (1.0, 1.0, 1.0))
    found = pace.take(waited_s=1.25)  # the total so far
    assert (found.steps, found.window_s, found.own_s, found.waited_s) == (1, 5.0, 2.0, 0.25)
    assert found.step_s_p50 == found.step_s_p99 == 3.0


def test_the_time_of_an_evaluation_is_no_time_of_steps(clocks: Clocks) -> None:
    pace = Pace(torch.device("cpu"))
    for _ in range(3):
        clocks.step(pace, (0.0, 0.5, 0.5))
        clocks.now_s += 50.0
        pace.exclude(50.0)
    found = over_ranks([pace.take(0.0)], WORK)
    assert (found["images_per_s"], found["step_s_p99"]) == (8.0, 1.0)


def test_one_rank() -> None:
    assert over_ranks([FIGURES], WORK) == {
        "images_per_s": 3.2,
        "mfu": pytest.approx(8e9 / 2.0 / 1e12),
        "step_s_p50": 2.0,
        "step_s_p99": 3.0,
        "slowest_rank": 0,
        "slowest_ratio": 1.0,
        "data_wait": 0.1,
        "memory_gib": 1.0,
        "memory_peak_gib": 2.0,
    }


def test_each_figure_is_that_of_the_rank_where_it_is_worst() -> None:
    ranks = [
        FIGURES,
        replace(FIGURES, own_s=20.0, memory_bytes=2 * GIB),
        replace(FIGURES, waited_s=4.0, step_s_p99=7.0),
        replace(FIGURES, step_s_p50=4.0, peak_memory_bytes=3 * GIB),
    ]
    found = over_ranks(ranks, WORK)
    assert (found["slowest_rank"], found["slowest_ratio"]) == (1, 4.0)
    assert (found["step_s_p50"], found["step_s_p99"], found["data_wait"]) == (4.0, 7.0, 0.4)
    assert (found["memory_gib"], found["memory_peak_gib"]) == (2.0, 3.0)
    assert found["mfu"] == pytest.approx(8e9 / 4.0 / 4e12)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
def test_the_slowest_rank_is_never_faster_than_the_median(own_s: list[float]) -> None:
    found = over_ranks([replace(FIGURES, own_s=seconds) for seconds in own_s], WORK)
    assert found.keys() == set(TIMED_KEYS)
    assert found["slowest_ratio"] == max(own_s) / median(own_s) >= 1
    assert own_s[int(found["slowest_rank"] or 0)] == max(own_s)
