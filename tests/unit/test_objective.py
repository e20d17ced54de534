"""The training objective: losses by sample, their sums, and the draws behind them."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from dit_scale import rng
from dit_scale.config import ModelConfig
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.diffusion import schedule as schedules
from dit_scale.models import dit
from dit_scale.rng import Purpose
from dit_scale.train import objective
from dit_scale.train.objective import Predict, SampleLosses, drop_labels, losses
from tests.support import philox
from tests.support.operators import Operators

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
def batch() -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    moments = torch.rand((NUM, 8, 4, 4), generator=generator).half()
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    return MicroBatch(moments, torch.arange(NUM) % NUM_CLASSES, torch.arange(100, 100 + NUM), weights)


def losses_of(
    predict: Predict, batch: MicroBatch, label_dropout: float = LABEL_DROPOUT, compile_loss: bool = False
) -> SampleLosses:
    return losses(
        predict,
        schedules.linear(1000),
        batch,
        seed=SEED,
        latent_scale=SCALE,
        null_class=NUM_CLASSES,
        label_dropout=label_dropout,
        compile_loss=compile_loss,
    )


@torch.no_grad()
def test_the_losses_of_a_sample_do_not_depend_on_its_neighbours(model: dit.DiT, batch: MicroBatch) -> None:
    together = losses_of(model, batch)
    for i in range(NUM):
        one = MicroBatch(*(getattr(batch, name)[i : i + 1] for name in vars(batch)))
        alone = losses_of(model, one)
        for name, value in zip(SampleLosses._fields, alone, strict=True):
            torch.testing.assert_close(value[0], getattr(together, name)[i], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_sums_are_weighted(model: dit.DiT, batch: MicroBatch) -> None:
    by_sample = losses_of(model, batch)
    expected = torch.stack([by_sample.total_B[:4].sum(), by_sample.mse_B[:4].sum(), by_sample.vb_B[:4].sum()])
    torch.testing.assert_close(by_sample.sums(batch.weight_B), expected)
    assert torch.equal(by_sample.sums(torch.zeros(NUM)), torch.zeros(3))


# The draws of a micro-batch, compared with draws computed here


class Seen:
    """A model that keeps its inputs and returns zero: its error is the noise."""

    def __call__(self, x_BCHW: torch.Tensor, t_B: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        self.x_BCHW, self.t_B, self.y_B = x_BCHW, t_B, y_B
        return torch.zeros(len(x_BCHW), 2 * x_BCHW.shape[1], *x_BCHW.shape[2:])


def signal(t: int) -> float:
    """Return alpha_bar of the linear schedule of 1000 steps: the remaining variance of the latent."""
    return math.prod(1 - (1e-4 + (2e-2 - 1e-4) * step / 999) for step in range(t + 1))


def test_every_draw_is_keyed_by_purpose_and_position(batch: MicroBatch) -> None:
    seen = Seen()
    found = losses_of(seen, batch)
    for i, position in enumerate(batch.position_B.tolist()):
        t = philox.words(SEED, philox.TIMESTEP, position, 1)[0] * 1000 >> 32
        is_dropped = philox.uniform(SEED, philox.LABEL_DROP, position) < LABEL_DROPOUT
        noise, posterior = (
            np.reshape(philox.normals(SEED, purpose, position, 64), (4, 4, 4))
            for purpose in (philox.NOISE, philox.POSTERIOR)
        )
        mean, std = batch.moments_B2CHW[i].double().numpy().reshape(2, 4, 4, 4)
        z = SCALE * (mean + std * posterior)
        x = math.sqrt(signal(t)) * z + math.sqrt(1 - signal(t)) * noise
        assert found.t_B[i] == seen.t_B[i] == t
        assert seen.y_B[i] == (NUM_CLASSES if is_dropped else batch.y_B[i])
        np.testing.assert_allclose(seen.x_BCHW[i].numpy(), x, rtol=1e-4, atol=1e-5)
        assert found.mse_B[i].item() == pytest.approx(np.square(noise).mean(), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_configured_share_of_labels_is_dropped(share: float) -> None:
    num = 20_000
    labels = torch.arange(num) % NUM_CLASSES
    batch = MicroBatch(torch.ones(num, 8, 1, 1).half(), labels, torch.arange(num), torch.ones(num))
    seen = Seen()
    losses_of(seen, batch, share)
    is_dropped = seen.y_B == NUM_CLASSES
    assert torch.equal(seen.y_B[~is_dropped], labels[~is_dropped])
    drawn = [philox.uniform(SEED, philox.LABEL_DROP, position) < share for position in range(500)]
    assert is_dropped[:500].tolist() == drawn
    print(f"{is_dropped.sum()} of {num} labels are dropped at a share of {share}")
    assert abs(is_dropped.sum().item() - share * num) <= 4 * math.sqrt(num * share * (1 - share))


def test_a_label_is_dropped_when_its_draw_is_below_the_share() -> None:
    position_B = torch.arange(1000)
    y_B = position_B % NUM_CLASSES
    draws = rng.uniforms(SEED, Purpose.LABEL_DROP, position_B).tolist()
    share = sorted(draws)[100]  # equal to one of the draws: that label stays
    kept = drop_labels(y_B, position_B, NUM_CLASSES, share, SEED)
    assert kept.tolist() == [
        NUM_CLASSES if draw < share else y for draw, y in zip(draws, y_B.tolist(), strict=True)
    ]
    assert int((kept == NUM_CLASSES).sum()) == 100


def test_the_draws_of_a_micro_batch_are_four_kernels() -> None:
    """Counted on the meta device: on CUDA, each operator that is not a view launches at least one kernel."""
    batch = MicroBatch(
        torch.empty((8, 8, 32, 32), dtype=torch.half),
        *(torch.empty(8, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.float32)),
    )
    batch = batch.to(torch.device("meta"))
    schedule = schedules.linear(1000).to(torch.device("meta"))
    output = torch.empty((8, 8, 32, 32), device="meta", requires_grad=True)
    with Operators() as seen:
        by_sample = losses(
            lambda *_: output,
            schedule,
            batch,
            seed=SEED,
            latent_scale=SCALE,
            null_class=NUM_CLASSES,
            label_dropout=LABEL_DROPOUT,
        )
        forward = seen.kernels()
        by_sample.sums(batch.weight_B)[0].backward()
    draws = {name: count for name, count in seen.called.items() if name.startswith("dit_scale::")}
    print(f"{forward} kernels forward, {seen.kernels()} with the backward pass")
    assert draws == {"dit_scale::normals": 2, "dit_scale::integers": 1, "dit_scale::uniforms": 1}
    assert seen.kernels() < 200


# torch's compiler reads .grad of the model's output and ignores the warning, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_compiled_loss_is_one_graph_and_equal_up_to_rounding(
    model: dit.DiT, batch: MicroBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def counting_backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile_function, backend=counting_backend, fullgraph=True))
    objective.compiled_loss.cache_clear()
    torch._dynamo.reset()
    plain = losses_of(model, batch)
    compiled = [losses_of(model, batch, compile_loss=True) for _ in range(2)]
    objective.compiled_loss.cache_clear()
    torch._dynamo.reset()
    assert len(graphs) == 1
    for found in compiled:
        for name, value in zip(SampleLosses._fields, found, strict=True):
            torch.testing.assert_close(value, getattr(plain, name))
