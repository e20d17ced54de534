"""Moving averages: the formulas of the profiles, and that sharding does not change a bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import EmaProfile
from dit_scale.train.ema import Ema, Followers, decay_at, ema_kind, power_gamma

CONSTANT = EmaProfile(name="constant", decay=0.9)
POWER = EmaProfile(name="power", sigma_rel=0.1)
PROFILES = (CONSTANT, POWER)


def owned(*sizes: int) -> tuple[Partition, ...]:
    return tuple(Partition({MASTER: torch.zeros(size)}, (ParameterSlice("w", 0, size, 0),)) for size in sizes)


def averages(partitions: tuple[Partition, ...], profile: EmaProfile) -> torch.Tensor:
    return torch.cat([partition.buffers[ema_kind(profile.name)] for partition in partitions])


def follow(partitions: tuple[Partition, ...], steps: list[torch.Tensor]) -> Ema:
    """Average masters that take these values; the first is the initial copy."""
    ema = Ema(PROFILES, partitions)
    for step, values in enumerate(steps):
        pieces = values.split([partition.buffers[MASTER].numel() for partition in partitions])
        for partition, piece in zip(partitions, pieces, strict=True):
            partition.buffers[MASTER].copy_(piece)
        if step == 0:
            ema.start()
        else:
            ema.update(step)
    return ema


def walk(num_steps: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(num_steps + 1, size, generator=generator).cumsum(0))


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28])
def test_gamma_gives_the_profile_its_relative_width(sigma_rel: float) -> None:
    # The weight of the weights at time tau in an average at time 1 is (gamma + 1) tau^gamma.
    gamma = power_gamma(sigma_rel)
    edges = np.linspace(0, 1, 200_001)
    weight = np.diff(edges ** (gamma + 1))
    tau = (edges[1:] + edges[:-1]) / 2
    mean = (weight * tau).sum()
    assert np.sqrt((weight * (tau - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-4)


def test_published_gammas() -> None:
    """Karras et al. 2024, Section 3.1: gamma 6.94 and 16.97 have widths of 10 % and 5 %."""
    assert power_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert power_gamma(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize("step", [1, 2, 100, 10**6])
def test_decays(step: int) -> None:
    assert decay_at(CONSTANT, step) == 0.9
    assert decay_at(POWER, step) == pytest.approx((1 - 1 / step) ** (power_gamma(0.1) + 1))
    assert 0 <= decay_at(POWER, step) < 1


def test_updates_follow_the_formula() -> None:
    steps = walk(60, 37)
    partitions = owned(37)
    follow(partitions, steps)
    for profile in PROFILES:
        expected = steps[0].double()
        for step, values in enumerate(steps[1:], start=1):
            beta = 0.9 if profile is CONSTANT else (1 - 1 / step) ** (power_gamma(0.1) + 1)
            expected = beta * expected + (1 - beta) * values.double()
        torch.testing.assert_close(averages(partitions, profile).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_power_profile_weighs_the_past_by_its_power() -> None:
    # After T steps, step t has the weight (t^(g+1) - (t-1)^(g+1)) / T^(g+1), and the initial weights 0.
    steps = walk(50, 8)
    partitions = owned(8)
    follow(partitions, steps)
    edges = (np.arange(51) / 50) ** (power_gamma(0.1) + 1)
    expected = sum(weight * values.double() for weight, values in zip(np.diff(edges), steps[1:], strict=True))
    torch.testing.assert_close(averages(partitions, POWER).double(), expected, rtol=1e-3, atol=1e-3)


def test_a_power_profile_forgets_the_initial_weights_immediately() -> None:
    steps = walk(1, 8)
    partitions = owned(8)
    follow(partitions, steps)
    assert torch.equal(averages(partitions, POWER), steps[1])


def test_start_copies_the_masters() -> None:
    steps = walk(0, 8)
    partitions = owned(8)
    follow(partitions, steps)
    for profile in PROFILES:
        assert torch.equal(averages(partitions, profile), steps[0])
        assert averages(partitions, profile).data_ptr() != partitions[0].buffers[MASTER].data_ptr()


@given(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=4), min_size=1, max_size=5))
def test_sharded_averages_equal_replicated_ones_bitwise(buffers_of_ranks: list[list[int]]) -> None:
    total = sum(map(sum, buffers_of_ranks))
    steps = walk(12, total)
    replicated = owned(total)
    follow(replicated, steps)
    sharded: list[Partition] = []
    start = 0
    for sizes in buffers_of_ranks:
        rank = owned(*sizes)
        follow(rank, [values[start : start + sum(sizes)] for values in steps])
        sharded += rank
        start += sum(sizes)
    for profile in PROFILES:
        assert torch.equal(averages(replicated, profile), averages(tuple(sharded), profile))


def test_masters_are_not_modified() -> None:
    steps = walk(3, 8)
    partitions = owned(8)
    follow(partitions, steps)
    assert torch.equal(partitions[0].buffers[MASTER], steps[-1])


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_the_optimizer_may_move_averages_of_the_first_profile(moved: int) -> None:
    """It takes some of those it is offered and leaves others, as when its step is dropped."""
    steps = walk(1, 20)
    expected, partitions = owned(12, 8), owned(12, 8)
    follow(expected, steps)
    followers: Followers = {}
    ema = Ema(PROFILES, partitions, followers)
    for values in steps:
        for partition, piece in zip(partitions, values.split([12, 8]), strict=True):
            partition.buffers[MASTER].copy_(piece)
        if values is steps[0]:
            ema.start()
    ema.offer(1)
    for partition in partitions[:moved]:
        average, weight = followers.pop(partition.buffers[MASTER].data_ptr())
        average.lerp_(partition.buffers[MASTER], weight)
    ema.update(1)
    for profile in PROFILES:
        assert torch.equal(averages(partitions, profile), averages(expected, profile))
