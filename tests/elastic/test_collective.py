"""The sum over the devices of a node before it takes part in a round."""

from pathlib import Path

import pytest

from dit_scale.elastic.node import collective
from dit_scale.elastic.node.collective import collective_problems

pytestmark = pytest.mark.dist


def test_devices_that_reach_each_other() -> None:
    assert collective_problems("cpu", 2) == []


def test_a_single_device_needs_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "_start", None)
    assert collective_problems("cpu", 1) == []


def test_missing_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (problem,) = collective_problems("cuda", 2)
    assert problem.startswith("a sum over the 2 devices of this node failed")
    assert all(f"local rank {rank}: dit_scale.errors.DeviceError: " in problem for rank in (0, 1))


def test_ranks_that_do_not_finish_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = collective._start

    def spy(*args: object) -> object:
        started.append(start(*args))  # type: ignore[arg-type]
        return started[-1]

    monkeypatch.setattr(collective, "_start", spy)
    monkeypatch.setattr(collective, "COLLECTIVE_S", 0.1)
    (problem,) = collective_problems("cpu", 2)
    assert "local rank 0 did not finish within 0.1 s; local rank 1 did not finish" in problem
    assert [Path(f"/proc/{process.pid}").exists() for process in started] == [False, False]
