"""The last update, computed from what AdamW keeps, against the difference that it made."""

import pytest
import torch

from dit_scale.checkpoint.partition import EXP_AVG, EXP_AVG_SQ, MASTER, Partition
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import OptimizerConfig
from dit_scale.train import update_norms
from dit_scale.train.optim import build_optimizer, set_moments
from dit_scale.train.update_norms import update_ratio

SIZE, PADDING = 1000, 24


def trained(config: OptimizerConfig, steps: int) -> tuple[Partition, torch.Tensor]:
    """Return a partition after some updates, and the masters before the last one."""
    generator = torch.Generator().manual_seed(0)
    buffers = {kind: torch.zeros(SIZE + PADDING) for kind in (MASTER, EXP_AVG, EXP_AVG_SQ)}
    master = buffers[MASTER]
    master.copy_(torch.randn(SIZE + PADDING, generator=generator))
    optimizer = build_optimizer([master], config, torch.device("cpu"))
    set_moments(optimizer, master, buffers[EXP_AVG], buffers[EXP_AVG_SQ])
    for _ in range(steps):
        before = master.clone()
        master.grad = 0.01 * torch.randn(SIZE + PADDING, generator=generator)
        optimizer.step()
    # Two parameters; between and behind them is padding, which has no defined value.
    slices = (ParameterSlice("a", 0, 400, 0), ParameterSlice("b", 0, 600, 400 + PADDING // 2))
    return Partition(buffers, slices), before


def real(values: torch.Tensor) -> torch.Tensor:
    return torch.cat((values[:400], values[400 + PADDING // 2 :][:600])).double()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize("chunk", [64, 2**22])
def test_norms_are_those_of_the_update_that_was_made(
    weight_decay: float, steps: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_norms, "CHUNK", chunk)
    config = OptimizerConfig(lr=0.01, weight_decay=weight_decay, eps=1e-3, betas=(0.8, 0.95))
    partition, before = trained(config, steps)
    after = partition.buffers[MASTER].clone()
    settings = config.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    update_sq, master_sq = update_norms.update_norms([partition], settings, steps)
    made_sq = (real(after) - real(before)).square().sum().item()
    assert update_sq == pytest.approx(made_sq, rel=1e-4)
    assert master_sq == pytest.approx(real(after).square().sum().item(), rel=1e-6)
    assert torch.equal(partition.buffers[MASTER], after)


def test_the_ratio_is_over_all_ranks() -> None:
    assert update_ratio([(0.09, 1.0), (0.16, 24.0)]) == pytest.approx(0.1)
    assert update_ratio([(0.0, 1.0)]) == 0.0
    assert update_ratio([None, None]) is None
