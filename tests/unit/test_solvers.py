"""The order of the samplers, on data whose score is known; spacings; details of the multistep solvers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_scale.diffusion.methods import SAMPLERS
from dit_scale.diffusion.multistep import dpmpp_2m, unipc
from dit_scale.diffusion.sampler import ddim
from dit_scale.diffusion.schedule import float64_tables, linear, respace
from dit_scale.diffusion.spacing import select
from dit_scale.errors import ConfigError

FULL = linear(1000)
ALPHAS_CUMPROD = float64_tables(FULL.betas_float64)["alphas_cumprod"]
LATENTS = (2, 4, 3, 3)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def last(steps):
    *_, x_BCHW = steps
    return x_BCHW


# A mixture of two Gaussians in every element.
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.8], dtype=torch.float64)
STDS = torch.tensor([0.6, 0.4], dtype=torch.float64)
FINE = linear(1_000_000)
"""So many timesteps that rounding to one of them does not matter."""
FINE_ALPHAS_CUMPROD = float64_tables(FINE.betas_float64)["alphas_cumprod"]


def exact_model(x_BCHW, timestep):
    """E[noise | x_t] of the mixture, from its score; no variance."""
    alpha_bar = FINE_ALPHAS_CUMPROD[timestep]
    variances = alpha_bar * STDS**2 + 1 - alpha_bar
    offsets = x_BCHW.double()[..., None] - math.sqrt(alpha_bar) * MEANS
    log_densities = WEIGHTS.log() - 0.5 * variances.log() - 0.5 * offsets**2 / variances
    scores = -(log_densities.softmax(-1) * offsets / variances).sum(-1)
    eps = -math.sqrt(1 - alpha_bar) * scores
    return torch.cat([eps, torch.zeros_like(eps)], dim=1)


def solve(method, num_steps):
    schedule = respace(FINE, str(num_steps), "logsnr")
    return last(SAMPLERS[method](exact_model, schedule, randn(4, 4, 8, 8), lambda step: None))


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("unipc", 3)])
def test_the_error_falls_with_the_order_of_the_solver(method, order):
    reference = solve("unipc", 1000)
    counts = (20, 28, 40, 57, 80)
    errors = [float((solve(method, count) - reference).abs().mean()) for count in counts]
    slope, _ = np.polyfit(np.log(counts), np.log(errors), 1)
    print(f"{method}: errors {', '.join(f'{e:.2e}' for e in errors)}, slope {slope:.2f}")
    assert slope == pytest.approx(-order, abs=0.2)


def test_the_exact_model_leads_to_its_mixture():
    x = solve("unipc", 50).double().flatten()
    mean = float((WEIGHTS * MEANS).sum())
    std = math.sqrt(float((WEIGHTS * (STDS**2 + MEANS**2)).sum()) - mean**2)
    # 1,024 draws: the mean is known to 0.03.
    assert x.mean().item() == pytest.approx(mean, abs=0.1)
    assert x.std().item() == pytest.approx(std, abs=0.07)


def linear_model(x_BCHW, timestep):
    return torch.cat([0.5 * x_BCHW + timestep / 1000, torch.zeros_like(x_BCHW)], dim=1)


@pytest.mark.parametrize("solver", [dpmpp_2m, unipc])
def test_the_first_step_is_that_of_ddim(solver):
    schedule = respace(FULL, "10")
    first = next(solver(linear_model, schedule, randn(*LATENTS)))
    expected = next(ddim(linear_model, schedule, randn(*LATENTS)))
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)


def test_the_last_step_returns_the_predicted_x_start():
    *_, before, x_BCHW = dpmpp_2m(linear_model, respace(FULL, "10"), randn(*LATENTS))
    eps = linear_model(before, 0)[:, :4]
    expected = (before - math.sqrt(1 - ALPHAS_CUMPROD[0]) * eps) / math.sqrt(ALPHAS_CUMPROD[0])
    torch.testing.assert_close(x_BCHW, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "logsnr"])
def test_each_step_is_one_pass_at_its_timestep(method, spacing):
    asked = []

    def predict(x_BCHW, timestep):
        asked.append(timestep)
        return torch.zeros(2, 8, 3, 3)

    schedule = respace(FULL, "20", spacing)
    steps = list(SAMPLERS[method](predict, schedule, randn(*LATENTS), lambda step: randn(*LATENTS)))
    assert asked == schedule.timesteps.flip(0).tolist()
    assert len(steps) == 20


@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_a_constant_prediction_of_x_start_is_reached_exactly(method):
    """All solvers integrate a constant x_start without error."""
    target = randn(*LATENTS, seed=5)

    def predict(x_BCHW, timestep):
        alpha_bar = ALPHAS_CUMPROD[timestep]
        eps = (x_BCHW.double() - math.sqrt(alpha_bar) * target) / math.sqrt(1 - alpha_bar)
        return torch.cat([eps, eps], dim=1).float()

    x_BCHW = last(
        SAMPLERS[method](predict, respace(FULL, "20"), randn(*LATENTS), lambda step: randn(*LATENTS))
    )
    torch.testing.assert_close(x_BCHW, target, rtol=0, atol=1e-5)


# Spacings


def test_quadratic_spacing_squares_the_index():
    kept = select(ALPHAS_CUMPROD, "10", "quadratic")
    assert kept == [math.floor(999 * i**2 / 81) for i in range(10)]


def test_logsnr_spacing_is_even_in_lambda():
    lambdas = 0.5 * np.log(FINE_ALPHAS_CUMPROD / (1 - FINE_ALPHAS_CUMPROD))
    kept = select(FINE_ALPHAS_CUMPROD, "20", "logsnr")
    gaps = np.diff(lambdas[kept])
    assert gaps[3:] == pytest.approx(gaps.mean(), rel=1e-2)
    # The first timesteps are further apart than the spacing is exact: their log SNR is steep.
    assert gaps[:3] == pytest.approx(gaps.mean(), rel=0.5)


@given(st.integers(21, 1500), st.sampled_from(["quadratic", "logsnr"]), st.data())
@settings(deadline=None, max_examples=60)
def test_spacings_keep_distinct_timesteps_and_both_ends(num_timesteps, spacing, data):
    count = data.draw(st.integers(2, num_timesteps))
    alphas_cumprod = float64_tables(linear(num_timesteps).betas_float64)["alphas_cumprod"]
    kept = select(alphas_cumprod, str(count), spacing)
    assert len(kept) == count
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, num_timesteps - 1)


@pytest.mark.parametrize("spacing", ["quadratic", "logsnr"])
def test_every_timestep_can_be_kept(spacing):
    assert select(ALPHAS_CUMPROD, "1000", spacing) == list(range(1000))


@pytest.mark.parametrize("spacing", ["quadratic", "logsnr"])
@pytest.mark.parametrize("spec", ["1", "0", "1001", "ddim50", "10,15,20", "-3", "2.5", ""])
def test_other_spacings_take_a_possible_number_of_steps_only(spec, spacing):
    with pytest.raises(ConfigError, match="between 2 and 1000"):
        respace(FULL, spec, spacing)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ConfigError, match="expected one of uniform, quadratic, logsnr"):
        respace(FULL, "20", "cosine")
