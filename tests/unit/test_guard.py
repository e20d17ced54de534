"""The guard's verdicts and running means, checked by plain arithmetic, and the gate before the update."""

import json
from collections.abc import Callable
from math import inf, nan

import pytest
import torch

from dit_scale.config import GuardConfig, OptimizerConfig
from dit_scale.train.guard import Guard
from dit_scale.train.optim import build_optimizer, gate

CPU = torch.device("cpu")
HORIZON = 4


def new_guard(spike_factor: float = 3.0) -> Guard:
    return Guard(GuardConfig(spike_factor=spike_factor, horizon_steps=HORIZON), CPU)


def judge(guard: Guard, loss: float, norm: float) -> float:
    verdict = guard.judge(torch.tensor(loss), torch.tensor(norm))
    assert (verdict.dtype, verdict.shape) == (torch.float32, ())
    return verdict.item()


def warmed_up(guard: Guard) -> Guard:
    assert [judge(guard, 1.0, 2.0) for _ in range(HORIZON)] == [0.0] * HORIZON
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(nan, 1.0), (inf, 1.0), (-inf, 1.0), (1.0, nan), (1.0, inf)])
@pytest.mark.parametrize("spike_factor", [0.0, 3.0])
def test_a_value_that_is_not_finite_fails_from_the_first_step(
    spike_factor: float, loss: float, norm: float
) -> None:
    guard = new_guard(spike_factor)
    assert judge(guard, loss, norm) == 1.0
    assert guard.state() == {"loss": 0.0, "grad_norm": 0.0, "updates": 0.0, "failed_in_a_row": 1.0}
    assert judge(warmed_up(guard), loss, norm) == 1.0


@pytest.mark.parametrize(
    ("loss", "norm", "failed"), [(3.0, 6.0, 0.0), (3.01, 2.0, 1.0), (1.0, 6.01, 1.0), (0.0, 0.0, 0.0)]
)
def test_a_spike_is_more_than_the_factor_times_the_mean(loss: float, norm: float, failed: float) -> None:
    assert judge(warmed_up(new_guard()), loss, norm) == failed


def test_spikes_are_not_judged_before_the_horizon_or_without_a_factor() -> None:
    young, without = new_guard(), new_guard(spike_factor=0.0)
    assert [judge(young, 1000.0**step, 1.0) for step in range(HORIZON)] == [0.0] * HORIZON
    assert judge(warmed_up(without), 1e30, 1e30) == 0.0


def test_means_follow_the_formula_and_exclude_failures() -> None:
    guard = new_guard()
    loss_mean = norm_mean = 0.0
    updates = 0
    for step in range(20):
        failing = step in (3, 4, 11)
        loss, norm = 1.0 + 0.1 * (step % 7), 2.0 - 0.1 * (step % 5)
        assert judge(guard, nan if failing else loss, norm) == failing
        if not failing:
            updates += 1
            loss_mean += (loss - loss_mean) / min(updates, HORIZON)
            norm_mean += (norm - norm_mean) / min(updates, HORIZON)
    assert updates == 17
    assert guard.state() == pytest.approx(
        {"loss": loss_mean, "grad_norm": norm_mean, "updates": 17, "failed_in_a_row": 0}, rel=1e-6
    )


def test_failures_in_a_row_are_counted_until_a_step_succeeds() -> None:
    guard = warmed_up(new_guard())
    counts = []
    for loss in (nan, 100.0, inf, 1.0, nan, 1.0):
        judge(guard, loss, 2.0)
        counts.append(guard.state()["failed_in_a_row"])
    assert counts == [1, 2, 3, 0, 1, 0]


def test_a_restored_guard_continues_to_the_same_bits() -> None:
    guard, later = new_guard(), new_guard()
    for step in range(7):
        judge(guard, 1.0 + 0.1 * step, nan if step == 6 else 2.0 / (step + 1))
    later.restore(json.loads(json.dumps(guard.state())))
    assert later.state() == guard.state()
    for loss in (1.2, 9.0, 1.3):
        assert judge(later, loss, 0.3) == judge(guard, loss, 0.3)
        assert later.state() == guard.state()


def test_start_resets_the_guard() -> None:
    guard = warmed_up(new_guard())
    judge(guard, nan, 2.0)
    guard.start()
    assert guard.state() == new_guard().state()


def adamw(weights: torch.nn.Linear) -> torch.optim.Optimizer:
    return build_optimizer([*weights.parameters()], OptimizerConfig(lr=0.1, weight_decay=0.1), CPU)


def plain_adam(weights: torch.nn.Linear) -> torch.optim.Optimizer:
    """An optimizer without `found_inf`, like the kernels of apex and DeepSpeed."""
    return torch.optim.Adam(weights.parameters(), lr=0.1, foreach=False)


@pytest.mark.parametrize("build", [adamw, plain_adam])
def test_a_skipped_update_changes_no_weights_moments_or_count(
    build: Callable[[torch.nn.Linear], torch.optim.Optimizer],
) -> None:
    torch.manual_seed(0)
    weights, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(weights.state_dict())
    optimizer, ungated = build(weights), build(twin)
    verdict = torch.zeros(())
    gate(optimizer, lambda: verdict)
    for step in range(4):
        gradient = torch.randn(2, 3)
        verdict.fill_(step in (0, 2))
        weights.weight.grad = torch.full_like(gradient, nan) if verdict else gradient.clone()
        optimizer.step()
        if not verdict:
            twin.weight.grad = gradient.clone()
            ungated.step()
        assert torch.equal(weights.weight, twin.weight)
    state, expected = optimizer.state[weights.weight], ungated.state[twin.weight]
    assert expected["step"] == 2
    assert set(state) == set(expected)
    assert all(torch.equal(state[kind], expected[kind]) for kind in expected)
