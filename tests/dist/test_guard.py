"""At every ZeRO stage, all ranks skip a failed step together, and it leaves no trace.

Each rank checks bit for bit that the failed steps leave masters, moments and AdamW's step count unchanged,
and that the next step is what it would be without them.
"""

from math import inf, isnan
from pathlib import Path

import pytest

from dit_scale.config import GuardConfig
from dit_scale.telemetry.meters import COLUMNS, SAMPLE_COLUMNS
from tests.support.latents import write_latents
from tests.support.ranks import guard_jobs, jobs
from tests.support.ranks.processes import run

pytestmark = pytest.mark.dist

GUARD = GuardConfig(spike_factor=20.0, horizon_steps=1)


@pytest.mark.parametrize(
    ("stage", "precision", "world", "clipping", "sub_group_elements"),
    [
        (1, "bf16", 3, 0.0, 10**9),
        (1, "fp32", 2, 0.0, 10**9),
        (2, "bf16", 3, 0.0, 10**9),
        (2, "bf16", 2, 1.0, 10**9),
        (2, "fp32", 2, 0.0, 10**9),
        (3, "bf16", 3, 0.0, 10**9),
        (3, "fp32", 2, 0.0, 20_000),
    ],
)
def test_failed_steps_leave_nothing(
    tmp_path: Path, stage: int, precision: str, world: int, clipping: float, sub_group_elements: int
) -> None:
    write_latents(tmp_path / "latents", num=14)
    config = jobs.small_config(tmp_path, tmp_path / "latents", zero_stage=stage, precision=precision)
    optimizer = config.optimizer.model_copy(update={"clip_grad_norm": clipping})
    config = config.model_copy(update={"guard": GUARD, "optimizer": optimizer})
    outcomes = run(world, guard_jobs.pass_over_failures, config, sub_group_elements)

    # as text, because NaN is not equal to itself
    assert len({repr((outcome.rows, outcome.guard)) for outcome in outcomes}) == 1
    assert len({outcome.weights for outcome in outcomes}) == 1
    names = (*COLUMNS, *SAMPLE_COLUMNS)
    first, nan, infinite, spike, after = (dict(zip(names, row, strict=True)) for row in outcomes[0].rows)
    assert [row["skipped"] for row in (first, nan, infinite, spike, after)] == [0, 1, 1, 1, 0]
    assert isnan(nan["loss"])
    assert isnan(nan["loss_max"])
    assert {sum(row[f"samples_q{quarter}"] for quarter in range(4)) for row in (first, after)} == {7.0}
    assert nan["grad_norm"] == infinite["grad_norm"] == inf
    assert infinite["loss"] == after["loss"]
    assert 20 * first["loss"] < spike["loss"] < inf
    assert 20 * first["grad_norm"] < spike["grad_norm"] < inf
    last = {"loss": after["loss"], "grad_norm": after["grad_norm"], "updates": 2, "failed_in_a_row": 0}
    assert outcomes[0].guard == last
    assert (outcomes[0].groups > 1) == (sub_group_elements < 10**9)
