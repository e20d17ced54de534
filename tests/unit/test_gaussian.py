"""The Gaussians against Bayes' rule on a grid, torch.distributions, and float64 restatements."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from dit_scale.diffusion.gaussian import (
    Gaussian,
    at,
    discretized_log_likelihood,
    learned_range_log_variance,
    normal_kl,
    p_mean_variance,
    predict_x_start,
    q_posterior,
    q_sample,
    split_output,
)
from dit_scale.diffusion.schedule import float64_tables, linear, respace

FULL = linear(1000)
SHORT = respace(FULL, "250")
T_B = torch.tensor([0, 1, 2, 100, 249])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def float64_at(schedule, name, t_B):
    return torch.from_numpy(float64_tables(schedule.betas_float64)[name])[t_B][:, None, None, None]


def test_at_gathers_one_entry_for_each_sample():
    entry_B111 = at(FULL.betas, torch.tensor([999, 0]))
    assert entry_B111.shape == (2, 1, 1, 1)
    assert entry_B111.flatten().tolist() == pytest.approx([2e-2, 1e-4])


def test_split_output_is_eps_then_v_in_fp32():
    output = randn(2, 8, 3, 3).bfloat16()
    eps, v = split_output(output)
    assert eps.dtype == v.dtype == torch.float32
    assert torch.equal(torch.cat([eps, v], dim=1), output.float())


@pytest.mark.parametrize("schedule", [FULL, SHORT], ids=["1000", "250"])
def test_q_sample_scales_signal_and_noise(schedule):
    x_start, noise = randn(5, 4, 2, 2), randn(5, 4, 2, 2, seed=1)
    alpha_bar = float64_at(schedule, "alphas_cumprod", T_B)
    expected = alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise
    actual = q_sample(schedule, x_start, T_B, noise)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_predict_x_start_inverts_q_sample():
    t = torch.arange(1000)
    x_start, noise = randn(1000, 4, 2, 2), randn(1000, 4, 2, 2, seed=1)
    x_t = q_sample(FULL, x_start, t, noise)
    # At t = 999 the rounding of x_t is multiplied by 157.
    torch.testing.assert_close(predict_x_start(FULL, x_t, t, noise), x_start, rtol=0, atol=2e-4)


@pytest.mark.parametrize("schedule", [FULL, SHORT], ids=["1000", "250"])
@pytest.mark.parametrize("t", [1, 2, 10, 120, 249])
def test_posterior_is_bayes_rule_on_a_grid(schedule, t):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    tables = float64_tables(schedule.betas_float64)
    beta, alpha_bar_prev = tables["betas"][t], tables["alphas_cumprod_prev"][t]
    x_start, x_t = 0.7, 0.55
    # Fine enough for the narrower of the two factors, wide enough for the tails of both.
    grid = np.linspace(-8, 8, 2_000_001)
    log_density = -((x_t - np.sqrt(1 - beta) * grid) ** 2) / (2 * beta) - (
        grid - np.sqrt(alpha_bar_prev) * x_start
    ) ** 2 / (2 * (1 - alpha_bar_prev))
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = (density * grid).sum()
    variance = (density * (grid - mean) ** 2).sum()

    coef_start, coef_t = tables["posterior_mean_coef_start"][t], tables["posterior_mean_coef_t"][t]
    assert coef_start * x_start + coef_t * x_t == pytest.approx(mean, rel=1e-9)
    assert tables["posterior_variance"][t] == pytest.approx(variance, rel=1e-8)
    assert np.exp(tables["posterior_log_variance_clipped"][t]) == pytest.approx(variance, rel=1e-8)

    q = q_posterior(
        schedule, torch.full((1, 1, 1, 1), x_start), torch.full((1, 1, 1, 1), x_t), torch.tensor([t])
    )
    assert q.mean_BCHW.item() == pytest.approx(mean, rel=1e-6)
    assert q.log_variance_BCHW.exp().item() == pytest.approx(variance, rel=1e-5)


def test_posterior_of_the_cleanest_step_is_x_start():
    x_start, x_t = randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1)
    q = q_posterior(FULL, x_start, x_t, torch.tensor([0]))
    torch.testing.assert_close(q.mean_BCHW, x_start, rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", [FULL, SHORT], ids=["1000", "250"])
def test_learned_variance_runs_from_posterior_to_beta(schedule):
    ones = torch.ones(5, 4, 2, 2)
    lower = at(schedule.posterior_log_variance_clipped, T_B).expand_as(ones)
    upper = at(schedule.log_betas, T_B).expand_as(ones)
    torch.testing.assert_close(learned_range_log_variance(schedule, -ones, T_B), lower, rtol=0, atol=0)
    torch.testing.assert_close(learned_range_log_variance(schedule, ones, T_B), upper, rtol=0, atol=0)
    middle = learned_range_log_variance(schedule, 0 * ones, T_B)
    torch.testing.assert_close(middle, (lower + upper) / 2)
    # Not clamped: v outside [-1, 1] extrapolates.
    beyond = learned_range_log_variance(schedule, 3 * ones, T_B)
    torch.testing.assert_close(beyond, 2 * upper - lower)


def test_learned_variance_has_the_published_ends():
    t = torch.tensor([0, 1, 999])
    v = torch.ones(3, 1, 1, 1)
    lower = learned_range_log_variance(FULL, -v, t).flatten().tolist()
    assert lower == pytest.approx([-9.816725135, -9.816725135, -3.912023829], rel=1e-6)
    assert learned_range_log_variance(FULL, v, t)[2].item() == pytest.approx(-3.912023005, rel=1e-6)


@pytest.mark.parametrize("schedule", [FULL, SHORT], ids=["1000", "250"])
def test_p_mean_is_the_other_form_of_the_paper(schedule):
    """Ho et al. 2020, eq. 11: mean = (x_t - beta / sqrt(1 - alpha_bar) eps) / sqrt(alpha)."""
    x_t, eps, v = randn(5, 4, 2, 2), randn(5, 4, 2, 2, seed=1), randn(5, 4, 2, 2, seed=2)
    beta = float64_at(schedule, "betas", T_B)
    alpha_bar = float64_at(schedule, "alphas_cumprod", T_B)
    expected = (x_t - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt()
    p = p_mean_variance(schedule, eps, v, x_t, T_B)
    torch.testing.assert_close(p.mean_BCHW.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(p.log_variance_BCHW, learned_range_log_variance(schedule, v, T_B))


def test_with_the_true_noise_p_is_the_posterior():
    x_start, noise = randn(5, 4, 2, 2), randn(5, 4, 2, 2, seed=1)
    x_t = q_sample(FULL, x_start, T_B, noise)
    p = p_mean_variance(FULL, noise, torch.full_like(noise, -1.0), x_t, T_B)
    q = q_posterior(FULL, x_start, x_t, T_B)
    torch.testing.assert_close(p.mean_BCHW, q.mean_BCHW, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(p.log_variance_BCHW, q.log_variance_BCHW.expand_as(noise))


MEANS = st.floats(-3, 3, width=32)
LOG_VARIANCES = st.floats(-10, 2, width=32)


@given(MEANS, LOG_VARIANCES, MEANS, LOG_VARIANCES)
@settings(deadline=None)
def test_normal_kl_equals_torch_distributions(mean_q, log_variance_q, mean_p, log_variance_p):
    numbers = torch.tensor([mean_q, log_variance_q, mean_p, log_variance_p], dtype=torch.float64)
    q, p = Gaussian(numbers[0], numbers[1]), Gaussian(numbers[2], numbers[3])
    expected = kl_divergence(
        Normal(q.mean_BCHW, (0.5 * q.log_variance_BCHW).exp()),
        Normal(p.mean_BCHW, (0.5 * p.log_variance_BCHW).exp()),
    )
    actual = normal_kl(q, p)
    assert actual >= 0
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_normal_kl_of_nearly_equal_gaussians_is_accurate():
    """KL of variances that differ by a factor of exp(d) is about d^2 / 4, below the fp32 rounding of 1."""
    d = 2**-13
    kl = normal_kl(Gaussian(torch.zeros(()), torch.tensor(0.0)), Gaussian(torch.zeros(()), torch.tensor(d)))
    assert kl.item() == pytest.approx(d**2 / 4, rel=0.05)


@pytest.mark.parametrize("mean", [-1.3, -0.4, 0.0, 0.99])
@pytest.mark.parametrize("log_variance", [-9.0, -4.0, 0.0])
def test_the_bins_of_all_pixels_have_total_probability_one(mean, log_variance):
    pixels = (torch.arange(256, dtype=torch.float64) * 2 / 255 - 1).reshape(1, 1, 16, 16)
    p = Gaussian(torch.full_like(pixels, mean), torch.full_like(pixels, log_variance))
    probability = discretized_log_likelihood(pixels, p).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-9)


def test_log_likelihood_is_the_integral_over_the_bin():
    """Within the 2e-4 of the tanh approximation; the outermost bins are open, also for latents beyond 1."""
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.31, 1.0, 1.7], dtype=torch.float64)
    mean, std = 0.1, 0.6
    p = Gaussian(torch.full_like(x, mean), torch.full_like(x, 2 * np.log(std)))
    normal = Normal(mean, torch.tensor(std, dtype=torch.float64))
    lower = torch.where(x < -0.999, 0, normal.cdf(x - 1 / 255))
    upper = torch.where(x > 0.999, 1, normal.cdf(x + 1 / 255))
    torch.testing.assert_close(discretized_log_likelihood(x, p).exp(), upper - lower, rtol=0, atol=4e-4)


def test_log_likelihood_has_a_floor_and_finite_gradients():
    mean = torch.zeros(3, requires_grad=True)
    log_variance = torch.full((3,), -9.0, requires_grad=True)
    likelihood = discretized_log_likelihood(torch.tensor([-50.0, 0.5, 50.0]), Gaussian(mean, log_variance))
    assert likelihood.tolist() == pytest.approx([np.log(1e-12)] * 3)
    likelihood.sum().backward()
    assert torch.isfinite(mean.grad).all()
    assert torch.isfinite(log_variance.grad).all()


def test_half_precision_inputs_give_fp32():
    x = randn(5, 4, 2, 2).bfloat16()
    assert q_sample(FULL, x, T_B, x).dtype == torch.float32
    assert predict_x_start(FULL, x, T_B, x).dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in p_mean_variance(FULL, x, x, x, T_B))
