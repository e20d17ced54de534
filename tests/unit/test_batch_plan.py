"""Splitting a global batch over ranks and micro-steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.data.batch_plan import BatchPlan, batch_plan
from dit_scale.errors import ConfigError


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "micro_steps", "actual_micro_batch"),
    [
        (256, 32, 8, 1, 32),
        (256, 32, 1, 8, 32),
        (256, 64, 8, 1, 32),
        (256, 32, 6, 2, 22),
        (256, 32, 7, 2, 19),
        (256, 32, 256, 1, 1),
        (7, 32, 3, 1, 3),
        (7, 2, 3, 2, 2),
        (1, 1, 1, 1, 1),
    ],
)
def test_known_plans(
    global_batch: int, micro_batch: int, world: int, micro_steps: int, actual_micro_batch: int
) -> None:
    plan = batch_plan(global_batch, micro_batch, world)
    assert plan == BatchPlan(global_batch, world, actual_micro_batch, micro_steps)
    assert plan.loss_scale == world / global_batch


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 300))
def test_a_plan_has_all_samples_and_little_padding(global_batch: int, micro_batch: int, world: int) -> None:
    world = min(world, global_batch)
    plan = batch_plan(global_batch, micro_batch, world)
    shares = [len(plan.rank_samples(rank)) for rank in range(world)]
    assert sum(shares) == global_batch
    assert plan.micro_batch <= micro_batch
    # As few micro-steps as the limit allows, and less padding on the fullest rank than micro-steps.
    assert plan.micro_steps == -(-max(shares) // micro_batch)
    assert 0 <= plan.micro_steps * plan.micro_batch - max(shares) < plan.micro_steps


def test_more_processes_than_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch=3 is smaller than the world size of 4"):
        batch_plan(3, 1, 4)
