"""A run with Triton's AdamW, in its interpreter, trains as with torch's, and failed steps have no effect."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from dit_scale.config import GuardConfig
from tests.support.latents import write_latents
from tests.support.needs import needs
from tests.support.ranks import guard_jobs, jobs, triton_jobs
from tests.support.ranks.processes import run

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("world", "stage", "precision", "left"),
    [(1, 2, "fp32", 1), (1, 2, "bf16", 0), (2, 1, "fp32", 0), (2, 2, "fp32", 0), (2, 3, "fp32", 0)],
)
def test_weights_and_averages(tmp_path: Path, world: int, stage: int, precision: str, left: int) -> None:
    """In fp32, a single process has a gradient per weight: the update cannot move the flat average."""
    needs(find_spec("triton") is not None, "triton")
    write_latents(tmp_path / "latents", num=40, num_classes=10)
    knobs = {"zero_stage": stage, "precision": precision}
    config = jobs.small_config(tmp_path / "run", tmp_path / "latents", **knobs)
    config = config.model_copy(update={"guard": GuardConfig(spike_factor=20.0, horizon_steps=1)})
    optimizer = config.optimizer.model_copy(update={"implementation": "triton"})
    expected = run(world, guard_jobs.pass_over_failures, config)[0]
    trained = run(world, triton_jobs.pass_over_failures, config.model_copy(update={"optimizer": optimizer}))
    assert {rank.optimizer for rank in trained} == {"TritonAdamW"}
    assert [(rank.left[0], rank.left[-1]) for rank in trained] == [(left, left)] * world
    found = trained[0].outcome
    weights, expected_weights = (np.frombuffer(one.weights, np.float32) for one in (found, expected))
    print(f"largest difference of a weight: {np.abs(weights - expected_weights).max():.1e}")
    rounding = 2e-7 if precision == "fp32" else 2e-3
    np.testing.assert_allclose(weights, expected_weights, rtol=0, atol=rounding)
    np.testing.assert_allclose(found.rows, expected.rows, rtol=100 * rounding)
