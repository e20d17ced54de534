"""What the samples of a step add up to: the same however they are split over ranks and micro-steps."""

from math import isnan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.data.batch_plan import batch_plan
from dit_scale.dist import World
from dit_scale.telemetry.meters import QUARTERS
from dit_scale.train.objective import SampleLosses
from dit_scale.train.sample_sums import SampleSums
from tests.support.operators import Operators

KERNELS = 8
"""Per micro-batch, beyond the sums of the losses (docs/performance.md)."""


def on_rank(rank: int, size: int, num_timesteps: int = 1000, device: str = "cpu") -> SampleSums:
    world = World(rank, size, torch.device(device), torch.distributed.ProcessGroup(0, 1))
    return SampleSums(num_timesteps, world)


def of_samples(losses: list[float], timesteps: list[int]) -> SampleLosses:
    loss_B = torch.tensor(losses)
    return SampleLosses(loss_B, 0.75 * loss_B, 0.25 * loss_B, torch.tensor(timesteps))


@given(
    samples=st.lists(st.tuples(st.integers(0, 64), st.integers(0, 99)), min_size=1, max_size=24),
    size=st.integers(1, 5),
    micro_batch=st.integers(1, 8),
)
def test_every_split_gives_the_sums_of_the_global_batch(
    samples: list[tuple[int, int]], size: int, micro_batch: int
) -> None:
    size = min(size, len(samples))
    plan = batch_plan(len(samples), micro_batch, size)
    total = torch.zeros(11 + size)
    for rank in range(size):
        sums = on_rank(rank, size, num_timesteps=100)
        vector = sums.start()
        for indices, num_real in zip(plan.indices(rank, 0)[0], plan.num_real(rank), strict=True):
            losses, timesteps = zip(*(samples[i] for i in indices), strict=True)
            # A filler repeats a sample, but its loss may round differently: it must not count at all.
            by_sample = of_samples([*losses[:num_real], *[999.0] * (len(losses) - num_real)], [*timesteps])
            weight_B = (torch.arange(len(losses)) < num_real).float()
            sums.add(vector, by_sample, by_sample.sums(weight_B), weight_B)
        total += vector
    losses_of_all, largest, by_quarter = on_rank(0, 1, num_timesteps=100).over_ranks(total)
    losses = [loss for loss, _ in samples]
    assert losses_of_all.tolist() == [sum(losses), 0.75 * sum(losses), 0.25 * sum(losses)]
    assert largest == max(losses)
    in_quarter = [[loss for loss, t in samples if t // 25 == quarter] for quarter in range(QUARTERS)]
    assert by_quarter.tolist() == [*map(sum, in_quarter), *map(len, in_quarter)]


@pytest.mark.parametrize("num_timesteps", [21, 1000, 1002])
def test_quarters_are_equal_up_to_one_timestep(num_timesteps: int) -> None:
    sums = on_rank(0, 1, num_timesteps)
    vector, weight_B = sums.start(), torch.ones(num_timesteps)
    by_sample = of_samples([1.0] * num_timesteps, list(range(num_timesteps)))
    sums.add(vector, by_sample, by_sample.sums(weight_B), weight_B)
    counts = vector[7:11].tolist()
    assert sum(counts) == num_timesteps
    assert max(counts) - min(counts) <= 1


def test_a_sample_that_is_not_a_number_shows_in_the_maximum() -> None:
    sums = on_rank(0, 1)
    vector, weight_B = sums.start(), torch.ones(2)
    for losses in ([1.0, torch.nan], [2.0, 3.0]):
        by_sample = of_samples(losses, [0, 999])
        sums.add(vector, by_sample, by_sample.sums(weight_B), weight_B)
    assert isnan(sums.over_ranks(vector)[1])


def test_the_sums_of_the_losses_keep_their_bits_and_their_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    sums, weight_B = on_rank(0, 1), torch.ones(5)
    vector, plain = sums.start(), torch.zeros(3)
    for _ in range(3):
        loss_B = torch.rand(5, generator=generator, requires_grad=True)
        by_sample = SampleLosses(loss_B, 0.3 * loss_B, 0.7 * loss_B, torch.arange(5))
        of_batch = by_sample.sums(weight_B)
        sums.add(vector, by_sample, of_batch, weight_B)
        plain += of_batch.detach()
        of_batch[0].backward()
        assert torch.equal(loss_B.grad, weight_B)
    assert torch.equal(vector[:3], plain)
    assert not vector.requires_grad


def test_samples_are_summed_in_a_few_kernels() -> None:
    """Counted on the meta device, where reading a number back is an error."""
    sums = on_rank(0, 8, device="meta")
    shapes = [torch.empty(32, device="meta") for _ in range(3)]
    by_sample = SampleLosses(*shapes, torch.empty(32, dtype=torch.int64, device="meta"))
    weight_B, vector = torch.empty(32, device="meta"), sums.start()
    of_batch = by_sample.sums(weight_B)
    with Operators() as seen:
        sums.add(vector, by_sample, of_batch, weight_B)
    print(f"{seen.kernels()} kernels: {dict(seen.called)}")
    assert seen.kernels() == KERNELS + 1  # with the addition of the losses
