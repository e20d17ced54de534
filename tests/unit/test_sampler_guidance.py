"""Classifier-free guidance against values computed by hand: channels, interval, calls of the model."""

import pytest
import torch

from dit_scale.diffusion.guidance import guided
from dit_scale.diffusion.methods import SAMPLERS
from dit_scale.diffusion.sampler import ddpm
from dit_scale.diffusion.schedule import linear, respace
from dit_scale.errors import ConfigError

FULL = linear(1000)
LATENTS = (2, 4, 3, 3)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_noise(step):
    return randn(*LATENTS, seed=1000 + step)


def last(steps):
    *_, x_BCHW = steps
    return x_BCHW


NULL_CLASS = 1000


class LabelledModel:
    """A model whose output depends on x, t and y in every channel; it records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_BCHW, timestep_B, y_B):
        assert timestep_B.dtype == torch.int64
        self.calls.append((x_BCHW, timestep_B, y_B))
        scale_B111 = (1 + 0.01 * y_B + 0.001 * timestep_B)[:, None, None, None]
        return torch.cat([x_BCHW * scale_B111, x_BCHW.square() + scale_B111], dim=1)


@pytest.mark.parametrize(("guidance_channels", "num_guided"), [("first3", 3), ("all", 4)])
def test_guidance_extrapolates_only_its_channels(guidance_channels, num_guided):
    x, y = randn(*LATENTS), torch.tensor([207, 360])
    output = guided(LabelledModel(), y, NULL_CLASS, 4.0, guidance_channels)(x, 980)
    t = torch.tensor([980, 980])
    labelled = LabelledModel()(x, t, y)
    null = LabelledModel()(x, t, torch.full_like(y, NULL_CLASS))
    guided_eps = null + 4.0 * (labelled - null)
    torch.testing.assert_close(output[:, :num_guided], guided_eps[:, :num_guided])
    assert torch.equal(output[:, num_guided:], labelled[:, num_guided:])
    assert not torch.allclose(output[:, :num_guided], labelled[:, :num_guided])


def test_guidance_is_one_pass_of_the_same_x_with_and_without_label():
    model, x, y = LabelledModel(), randn(*LATENTS), torch.tensor([207, 360])
    guided(model, y, NULL_CLASS, 1.5, "first3")(x, 4)
    ((x_D, t_D, y_D),) = model.calls
    assert torch.equal(x_D, torch.cat([x, x]))
    assert t_D.tolist() == [4, 4, 4, 4]
    assert y_D.tolist() == [207, 360, NULL_CLASS, NULL_CLASS]


def test_scale_one_skips_the_pass_without_label():
    model, x, y = LabelledModel(), randn(*LATENTS), torch.tensor([207, 360])
    output = guided(model, y, NULL_CLASS, 1.0, "first3")(x, 4)
    ((_, t, y_B),) = model.calls
    assert t.tolist() == [4, 4]
    assert torch.equal(y_B, y)
    assert torch.equal(output, LabelledModel()(x, t, y))


def test_scale_zero_is_the_pass_without_label():
    x, y, t = randn(*LATENTS), torch.tensor([207, 360]), torch.tensor([4, 4])
    output = guided(LabelledModel(), y, NULL_CLASS, 0.0, "all")(x, 4)
    assert torch.equal(output[:, :4], LabelledModel()(x, t, torch.full_like(y, NULL_CLASS))[:, :4])


def test_guidance_refuses_other_channels():
    with pytest.raises(ConfigError, match="expected one of first3, all"):
        guided(LabelledModel(), torch.tensor([1]), NULL_CLASS, 1.5, "first4")


def test_guided_sampling_gives_each_sample_its_own_class():
    """Samples of a batch are independent: sampled together or alone, each is the same."""
    schedule, y = respace(FULL, "10"), torch.tensor([1, 5])

    def model(x_BCHW, timestep_B, y_B):
        return torch.cat([0.1 * x_BCHW + 0.1 * y_B[:, None, None, None], 0 * x_BCHW], dim=1)

    def sample(rows):
        predict = guided(model, y[rows], 0, 1.5, "first3")
        return last(ddpm(predict, schedule, randn(*LATENTS)[rows], lambda step: step_noise(step)[rows]))

    both = sample(slice(0, 2))
    torch.testing.assert_close(both[:1], sample(slice(0, 1)), rtol=0, atol=0)
    torch.testing.assert_close(both[1:], sample(slice(1, 2)), rtol=0, atol=0)


@pytest.mark.parametrize(("guidance_channels", "num_guided"), [("first3", 3), ("all", 4)])
@pytest.mark.parametrize(
    ("timestep", "inside"), [(199, False), (200, True), (500, True), (600, True), (601, False)]
)
def test_an_interval_includes_both_ends(guidance_channels, num_guided, timestep, inside):
    x, y, t = randn(*LATENTS), torch.tensor([207, 360]), torch.full((2,), timestep)
    model = LabelledModel()
    output = guided(model, y, NULL_CLASS, 4.0, guidance_channels, interval=(200, 600))(x, timestep)
    everywhere = guided(LabelledModel(), y, NULL_CLASS, 4.0, guidance_channels)(x, timestep)
    labelled = LabelledModel()(x, t, y)
    assert torch.equal(output, everywhere if inside else labelled)
    assert not torch.allclose(everywhere[:, :num_guided], labelled[:, :num_guided])
    assert torch.equal(everywhere[:, num_guided:], labelled[:, num_guided:])


@pytest.mark.parametrize("method", SAMPLERS)
def test_the_batch_is_doubled_only_inside_the_interval(method):
    schedule, model, y = respace(FULL, "ddim50"), LabelledModel(), torch.tensor([3, 7])

    def predict(x_BCHW, timestep_B, y_B):
        return 0.1 * model(x_BCHW.clamp(-1, 1), timestep_B, y_B)

    steps = SAMPLERS[method](
        guided(predict, y, NULL_CLASS, 1.5, "all", interval=(200, 600)), schedule, randn(*LATENTS), step_noise
    )
    assert len(list(steps)) == 50
    sizes = {int(t_B[0]): len(x_B) for x_B, t_B, _ in model.calls}
    assert sizes == {t: 4 if 200 <= t <= 600 else 2 for t in range(0, 1000, 20)}
    assert len(model.calls) == 50
    assert all(y_B.tolist() == [3, 7] for _, _, y_B in model.calls if len(y_B) == 2)
