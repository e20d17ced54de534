"""What a micro-batch contributes: losses by sample, and their sums."""

import pytest
import torch

from dit_scale import rng
from dit_scale.config import ModelConfig
from dit_scale.data.loader import Batch
from dit_scale.diffusion import schedule as schedules
from dit_scale.models import dit
from dit_scale.rng import Purpose
from dit_scale.train.objective import SampleLosses, drop_labels, losses

SEED, SCALE, NUM_CLASSES, LABEL_DROPOUT = 7, 0.5, 10, 0.1
NUM = 5


@pytest.fixture(scope="module")
def model() -> dit.DiT:
    model = dit.build(ModelConfig(name="DiT-Ti/2", image_size=32, num_classes=NUM_CLASSES), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    moments = torch.rand((NUM, 8, 4, 4), generator=generator).half()
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    return Batch(moments, torch.arange(NUM) % NUM_CLASSES, torch.arange(100, 100 + NUM), weights)


def settings(batch: Batch) -> tuple[schedules.Schedule, Batch, int, float, int, float]:
    return schedules.linear(1000), batch, SEED, SCALE, NUM_CLASSES, LABEL_DROPOUT


@torch.no_grad()
def test_the_losses_of_a_sample_do_not_depend_on_its_neighbours(model: dit.DiT, batch: Batch) -> None:
    together = losses(model, *settings(batch))
    assert torch.equal(together.t_B, rng.integers(SEED, Purpose.TIMESTEP, batch.position_B, 1000))
    for i in range(NUM):
        one = Batch(*(getattr(batch, name)[i : i + 1] for name in vars(batch)))
        alone = losses(model, *settings(one))
        for name, value in zip(SampleLosses._fields, alone, strict=True):
            torch.testing.assert_close(value[0], getattr(together, name)[i], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_sums_are_weighted(model: dit.DiT, batch: Batch) -> None:
    by_sample = losses(model, *settings(batch))
    expected = torch.stack([by_sample.total_B[:4].sum(), by_sample.mse_B[:4].sum(), by_sample.vb_B[:4].sum()])
    torch.testing.assert_close(by_sample.sums(batch.weight_B), expected)
    assert torch.equal(by_sample.sums(torch.zeros(NUM)), torch.zeros(3))


def test_a_label_is_dropped_when_its_draw_is_below_the_share() -> None:
    position_B = torch.arange(1000)
    y_B = position_B % NUM_CLASSES
    draws = rng.uniforms(SEED, Purpose.LABEL_DROP, position_B).tolist()
    share = sorted(draws)[100]  # that of one of them: its label stays
    kept = drop_labels(y_B, position_B, NUM_CLASSES, share, SEED)
    assert kept.tolist() == [
        NUM_CLASSES if draw < share else y for draw, y in zip(draws, y_B.tolist(), strict=True)
    ]
    assert int((kept == NUM_CLASSES).sum()) == 100
