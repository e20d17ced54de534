"""Every ZeRO stage on 1, 2 and 3 processes computes what one plain torch process computes.

Seven samples per step in micro-batches of two exercise uneven parts, fillers and accumulation. All weights
start random, because zero-initialised layers hide errors and Adam hides factors.
"""

from pathlib import Path

import pytest
import torch

from tests.support.ranks import jobs
from tests.support.ranks.processes import run

pytestmark = pytest.mark.dist

RELATIVE = {"fp32": 1e-5, "bf16": 1e-2}


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[jobs.LossRow]:
    config = jobs.small_config(tmp_path_factory.mktemp("plain"), data)
    return jobs.plain_training(config)[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("precision", "world"),
    [
        *(("fp32", world) for world in (1, 2, 3)),
        *(("bf16", world) for world in (1, 2)),
        pytest.param("bf16", 3, marks=pytest.mark.long),
    ],
)
def test_losses_and_gradient_norms(
    data: Path, reference: list[jobs.LossRow], tmp_path: Path, world: int, stage: int, precision: str
) -> None:
    config = jobs.small_config(tmp_path, data, zero_stage=stage, precision=precision)
    assert run(world, jobs.train, config, True) == [0] * world
    rows = jobs.losses(config)
    assert [row["step"] for row in rows] == list(range(1, 21))
    worst = {
        key: max(abs(row[key] / wanted[key] - 1) for row, wanted in zip(rows, reference, strict=True))
        for key in ("loss", "grad_norm")
    }
    print(f"ZeRO-{stage} {precision} on {world}: largest relative difference {worst}")
    assert max(worst.values()) < RELATIVE[precision]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_gradient(data: Path, tmp_path: Path, stage: int, precision: str) -> None:
    config = jobs.small_config(tmp_path, data, zero_stage=stage, precision=precision)
    config = config.model_copy(update={"steps": 1})
    pieces = run(3, jobs.gradient_of_first_step, config)
    wanted = jobs.plain_gradient(config)
    got = {name: torch.full_like(gradient, torch.nan) for name, gradient in wanted.items()}
    for rank in pieces:
        for (name, start), piece in rank.items():
            got[name][start : start + len(piece)] = torch.from_numpy(piece)
    whole_got, whole_wanted = torch.cat(list(got.values())), torch.cat([wanted[name] for name in got])
    error = ((whole_got - whole_wanted).norm() / whole_wanted.norm()).item()
    print(f"ZeRO-{stage} {precision}: relative error of the full gradient {error:.1e}")
    assert error < (1e-6 if precision == "fp32" else 2e-2)
