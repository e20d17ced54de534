"""The samplers against diffusers and an analytical solution; guidance against hand-computed values."""

import math

import pytest
import torch

from dit_scale.diffusion.sampler import ddim, ddpm, guided
from dit_scale.diffusion.schedule import float64_tables, linear, respace
from dit_scale.errors import ConfigError

FULL = linear(1000)
LATENTS = (2, 4, 3, 3)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_noise(step):
    return randn(*LATENTS, seed=1000 + step)


class RandomModel:
    """A model whose output depends only on the timestep; it records the timesteps."""

    def __init__(self):
        self.timesteps = []

    def __call__(self, x_BCHW, timestep_B):
        assert timestep_B.dtype == torch.int64
        assert (timestep_B == timestep_B[0]).all()
        self.timesteps.append(int(timestep_B[0]))
        batch, channels, *sides = x_BCHW.shape
        return randn(batch, 2 * channels, *sides, seed=int(timestep_B[0]))


def last(steps):
    *_, x_BCHW = steps
    return x_BCHW


def with_our_tables(scheduler):
    """Replace diffusers' fp32 tables by float64 ones, so that only the sampler's formulas can differ."""
    scheduler.alphas_cumprod = torch.from_numpy(float64_tables(FULL.betas_float64)["alphas_cumprod"])
    return scheduler


@pytest.mark.parametrize("spec", ["250", "50", "10,15,20", "1000"])
def test_ddpm_takes_the_steps_of_diffusers(spec, monkeypatch):
    from diffusers import DDPMScheduler

    schedule, model = respace(FULL, spec), RandomModel()
    ours = list(ddpm(model, schedule, randn(*LATENTS), step_noise))
    assert model.timesteps == schedule.timesteps.flip(0).tolist()

    theirs = with_our_tables(
        DDPMScheduler(beta_start=1e-4, beta_end=2e-2, variance_type="learned_range", clip_sample=False)
    )
    theirs.set_timesteps(timesteps=schedule.timesteps.flip(0).tolist())
    x_BCHW = randn(*LATENTS)
    for step, t in enumerate(theirs.timesteps):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, step=step, **__: step_noise(step)
        )
        x_BCHW = theirs.step(model(x_BCHW, t.expand(2)), t, x_BCHW).prev_sample
        # With random outputs x grows, so the error is relative to its size.
        torch.testing.assert_close(ours[step], x_BCHW.float(), rtol=0, atol=1e-5 * float(x_BCHW.abs().max()))


@pytest.mark.parametrize("num_steps", [50, 100])
def test_ddim_takes_the_steps_of_diffusers(num_steps):
    from diffusers import DDIMScheduler

    schedule, model = respace(FULL, f"ddim{num_steps}"), RandomModel()
    ours = list(ddim(model, schedule, randn(*LATENTS)))

    theirs = with_our_tables(
        DDIMScheduler(
            beta_start=1e-4, beta_end=2e-2, clip_sample=False, set_alpha_to_one=True, steps_offset=0
        )
    )
    theirs.set_timesteps(num_steps)
    assert model.timesteps == theirs.timesteps.tolist()
    x_BCHW = randn(*LATENTS)
    for step, t in enumerate(theirs.timesteps):
        eps_BCHW = model(x_BCHW, t.expand(2))[:, :4]
        x_BCHW = theirs.step(eps_BCHW, int(t), x_BCHW).prev_sample
        torch.testing.assert_close(ours[step], x_BCHW.float(), rtol=0, atol=1e-5 * float(x_BCHW.abs().max()))


def test_ddpm_requests_noise_once_for_each_step_except_the_last():
    asked = []

    def noise(step):
        asked.append(step)
        return step_noise(step)

    schedule = respace(FULL, "10")
    assert len(list(ddpm(RandomModel(), schedule, randn(*LATENTS), noise))) == 10
    assert asked == list(range(9))


@pytest.mark.parametrize("sampler", [lambda *args: ddpm(*args, step_noise), ddim], ids=["ddpm", "ddim"])
def test_sampling_keeps_fp32_no_graph_and_its_input(sampler):
    weight = torch.ones((), requires_grad=True)

    def predict(x_BCHW, timestep_B):
        return (weight * torch.cat([x_BCHW, x_BCHW], dim=1)).bfloat16()

    x_T = randn(*LATENTS)
    for x_BCHW in sampler(predict, respace(FULL, "10"), x_T):
        assert x_BCHW.dtype == torch.float32
        assert not x_BCHW.requires_grad
        assert torch.is_grad_enabled()  # the caller's own state, between steps
    assert torch.equal(x_T, randn(*LATENTS))


# Gaussian data N(mean, std^2), for which the optimal model is known.
DATA_MEAN, DATA_STD = 0.8, 0.5
MANY = (64, 4, 16, 16)


def optimal_model(schedule):
    """Return the exact E[noise | x_t] and, as v, the exact variance of x_{t-1} given x_t."""
    tables = {name: torch.from_numpy(table) for name, table in float64_tables(schedule.betas_float64).items()}
    index_of = {int(t): index for index, t in enumerate(schedule.timesteps)}

    def predict(x_BCHW, timestep_B):
        now = {name: float(table[index_of[int(timestep_B[0])]]) for name, table in tables.items()}
        alpha_bar = now["alphas_cumprod"]
        variance_t = alpha_bar * DATA_STD**2 + 1 - alpha_bar
        eps = math.sqrt(1 - alpha_bar) * (x_BCHW - math.sqrt(alpha_bar) * DATA_MEAN) / variance_t
        variance_start = DATA_STD**2 * (1 - alpha_bar) / variance_t
        variance_prev = now["posterior_variance"] + now["posterior_mean_coef_start"] ** 2 * variance_start
        lower, upper = now["posterior_log_variance_clipped"], now["log_betas"]
        v = 2 * (math.log(variance_prev) - lower) / (upper - lower) - 1
        return torch.cat([eps, torch.full_like(x_BCHW, v)], dim=1)

    return predict


@pytest.mark.parametrize("spec", ["10", "50"])
def test_ddpm_with_the_optimal_model_recovers_the_data(spec):
    """Exact for any number of steps: with the right variance, every step is exact for Gaussian data."""
    schedule = respace(FULL, spec)

    def noise(step):
        return randn(*MANY, seed=step + 1)

    x_BCHW = last(ddpm(optimal_model(schedule), schedule, randn(*MANY), noise))
    # 65,536 draws: the mean is known to 0.002, the deviation to 0.0014.
    assert x_BCHW.mean().item() == pytest.approx(DATA_MEAN, abs=0.008)
    assert x_BCHW.std().item() == pytest.approx(DATA_STD, abs=0.006)


@pytest.mark.parametrize(("spec", "tolerance"), [("ddim100", 0.05), ("1000", 0.005)])
def test_ddim_with_the_optimal_model_follows_the_flow(spec, tolerance):
    """The probability flow maps quantiles to quantiles; DDIM's error shrinks with the number of steps."""
    schedule = respace(FULL, spec)
    z_BCHW = randn(*LATENTS)
    x_BCHW = last(ddim(optimal_model(schedule), schedule, z_BCHW))
    alpha_bar = float64_tables(schedule.betas_float64)["alphas_cumprod"][-1]
    quantile_BCHW = (z_BCHW - math.sqrt(alpha_bar) * DATA_MEAN) / math.sqrt(
        alpha_bar * DATA_STD**2 + 1 - alpha_bar
    )
    torch.testing.assert_close(x_BCHW, DATA_MEAN + DATA_STD * quantile_BCHW, rtol=0, atol=tolerance)


NULL_CLASS = 1000


class LabelledModel:
    """A model whose output depends on x, t and y in every channel; it records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_BCHW, timestep_B, y_B):
        self.calls.append((x_BCHW, timestep_B, y_B))
        scale_B111 = (1 + 0.01 * y_B + 0.001 * timestep_B)[:, None, None, None]
        return torch.cat([x_BCHW * scale_B111, x_BCHW.square() + scale_B111], dim=1)


@pytest.mark.parametrize(("guidance_channels", "num_guided"), [("first3", 3), ("all", 4)])
def test_guidance_extrapolates_only_its_channels(guidance_channels, num_guided):
    x, t, y = randn(*LATENTS), torch.tensor([980, 980]), torch.tensor([207, 360])
    output = guided(LabelledModel(), y, NULL_CLASS, 4.0, guidance_channels)(x, t)
    labelled = LabelledModel()(x, t, y)
    null = LabelledModel()(x, t, torch.full_like(y, NULL_CLASS))
    guided_eps = null + 4.0 * (labelled - null)
    torch.testing.assert_close(output[:, :num_guided], guided_eps[:, :num_guided])
    assert torch.equal(output[:, num_guided:], labelled[:, num_guided:])
    assert not torch.allclose(output[:, :num_guided], labelled[:, :num_guided])


def test_guidance_is_one_pass_of_the_same_x_with_and_without_label():
    model, x, y = LabelledModel(), randn(*LATENTS), torch.tensor([207, 360])
    guided(model, y, NULL_CLASS, 1.5, "first3")(x, torch.tensor([4, 4]))
    ((x_D, t_D, y_D),) = model.calls
    assert torch.equal(x_D, torch.cat([x, x]))
    assert t_D.tolist() == [4, 4, 4, 4]
    assert y_D.tolist() == [207, 360, NULL_CLASS, NULL_CLASS]


def test_scale_one_skips_the_pass_without_label():
    model, x, y, t = LabelledModel(), randn(*LATENTS), torch.tensor([207, 360]), torch.tensor([4, 4])
    output = guided(model, y, NULL_CLASS, 1.0, "first3")(x, t)
    ((_, _, y_B),) = model.calls
    assert torch.equal(y_B, y)
    assert torch.equal(output, LabelledModel()(x, t, y))


def test_scale_zero_is_the_pass_without_label():
    x, y, t = randn(*LATENTS), torch.tensor([207, 360]), torch.tensor([4, 4])
    output = guided(LabelledModel(), y, NULL_CLASS, 0.0, "all")(x, t)
    assert torch.equal(output[:, :4], LabelledModel()(x, t, torch.full_like(y, NULL_CLASS))[:, :4])


def test_guidance_refuses_other_channels():
    with pytest.raises(ConfigError, match="expected 'first3' or 'all'"):
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
