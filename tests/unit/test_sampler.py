"""DDPM and DDIM against diffusers, against the Gaussians of the loss, and against an analytical solution."""

import math

import pytest
import torch

from dit_scale.diffusion.gaussian import p_mean_variance, split_output
from dit_scale.diffusion.sampler import ddim, ddpm
from dit_scale.diffusion.schedule import float64_tables, linear, respace

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

    def __call__(self, x_BCHW, timestep):
        assert type(timestep) is int
        self.timesteps.append(timestep)
        batch, channels, *sides = x_BCHW.shape
        return randn(batch, 2 * channels, *sides, seed=timestep)


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
        x_BCHW = theirs.step(model(x_BCHW, int(t)), t, x_BCHW).prev_sample
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
        eps_BCHW = model(x_BCHW, int(t))[:, :4]
        x_BCHW = theirs.step(eps_BCHW, int(t), x_BCHW).prev_sample
        torch.testing.assert_close(ours[step], x_BCHW.float(), rtol=0, atol=1e-5 * float(x_BCHW.abs().max()))


def test_ddpm_takes_the_steps_of_the_gaussians_that_the_loss_trains():
    """The sampler folds the equations into three coefficients; `gaussian` has them one by one."""
    schedule, model = respace(FULL, "50"), RandomModel()
    x_BCHW = randn(*LATENTS)
    for step, ours_BCHW in enumerate(ddpm(model, schedule, x_BCHW, step_noise)):
        t_B = torch.full((2,), 49 - step)
        eps_BCHW, v_BCHW = split_output(RandomModel()(x_BCHW, model.timesteps[-1]))
        p = p_mean_variance(schedule, eps_BCHW, v_BCHW, x_BCHW, t_B)
        noise_BCHW = step_noise(step) if step < 49 else torch.zeros(LATENTS)
        expected_BCHW = p.mean_BCHW + torch.exp(0.5 * p.log_variance_BCHW) * noise_BCHW
        limit = 1e-5 * float(x_BCHW.abs().max())
        torch.testing.assert_close(ours_BCHW, expected_BCHW, rtol=0, atol=limit)
        x_BCHW = ours_BCHW


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

    def predict(x_BCHW, timestep):
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

    def predict(x_BCHW, timestep):
        now = {name: float(table[index_of[timestep]]) for name, table in tables.items()}
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
