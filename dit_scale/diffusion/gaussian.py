"""The Gaussians of the diffusion: noising, the posterior, the model's reverse step, and their divergence.

All functions are pure. `t_B` (int64) indexes the given schedule; in a respaced schedule it differs from the
timestep that the model receives. Tables are fp32, so results are fp32 for any input type.

Shapes: B batch, C latent channels, H W latent height and width, 2C eps then v channels, T steps.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dit_scale.diffusion.schedule import Schedule


class Gaussian(NamedTuple):
    """A diagonal Gaussian over a latent, fp32."""

    mean_BCHW: Tensor
    log_variance_BCHW: Tensor


def at(table_T: Tensor, t_B: Tensor) -> Tensor:
    """Look up each sample's table entry => (B, 1, 1, 1), on the device, without a host synchronization."""
    return table_T[t_B][:, None, None, None]


def split_output(output_B2CHW: Tensor) -> tuple[Tensor, Tensor]:
    """Split the model's output => (eps_BCHW, v_BCHW) fp32: predicted noise and variance interpolation."""
    eps_BCHW, v_BCHW = output_B2CHW.float().chunk(2, dim=1)
    return eps_BCHW, v_BCHW


def q_sample(schedule: Schedule, x_start_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Sample x_t ~ q(x_t | x_start) with the given standard normal noise => x_t_BCHW."""
    # Ho et al. 2020, eq. 4.
    return (
        at(schedule.sqrt_alphas_cumprod, t_B) * x_start_BCHW
        + at(schedule.sqrt_one_minus_alphas_cumprod, t_B) * noise_BCHW
    )


def q_posterior(schedule: Schedule, x_start_BCHW: Tensor, x_t_BCHW: Tensor, t_B: Tensor) -> Gaussian:
    """Return q(x_{t-1} | x_t, x_start); its log variance is (B, 1, 1, 1) and clipped at index 0."""
    # Ho et al. 2020, eq. 6 and 7.
    mean_BCHW = (
        at(schedule.posterior_mean_coef_start, t_B) * x_start_BCHW
        + at(schedule.posterior_mean_coef_t, t_B) * x_t_BCHW
    )
    return Gaussian(mean_BCHW, at(schedule.posterior_log_variance_clipped, t_B))


def predict_x_start(schedule: Schedule, x_t_BCHW: Tensor, t_B: Tensor, eps_BCHW: Tensor) -> Tensor:
    """Recover x_start from x_t and its noise => x_start_BCHW, unclipped: a latent has no known range."""
    # Ho et al. 2020, eq. 15.
    return (
        at(schedule.sqrt_recip_alphas_cumprod, t_B) * x_t_BCHW
        - at(schedule.sqrt_recipm1_alphas_cumprod, t_B) * eps_BCHW
    )


def learned_range_log_variance(schedule: Schedule, v_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """Interpolate the log variance: v = -1 is the posterior's, v = 1 is log beta; v is not clamped."""
    # Nichol & Dhariwal 2021, eq. 15.
    fraction_BCHW = (v_BCHW + 1) / 2
    log_betas_B111 = at(schedule.log_betas, t_B)
    log_posterior_B111 = at(schedule.posterior_log_variance_clipped, t_B)
    return fraction_BCHW * log_betas_B111 + (1 - fraction_BCHW) * log_posterior_B111


def p_mean_variance(
    schedule: Schedule, eps_BCHW: Tensor, v_BCHW: Tensor, x_t_BCHW: Tensor, t_B: Tensor
) -> Gaussian:
    """Return p(x_{t-1} | x_t), the model's reverse step."""
    # Ho et al. 2020, eq. 11.
    x_start_BCHW = predict_x_start(schedule, x_t_BCHW, t_B, eps_BCHW)
    mean_BCHW = q_posterior(schedule, x_start_BCHW, x_t_BCHW, t_B).mean_BCHW
    return Gaussian(mean_BCHW, learned_range_log_variance(schedule, v_BCHW, t_B))


def normal_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) per element, in nats => kl_BCHW."""
    log_ratio_BCHW = q.log_variance_BCHW - p.log_variance_BCHW
    # expm1 avoids cancellation where the two variances are nearly equal (late timesteps).
    variances_BCHW = torch.expm1(log_ratio_BCHW) - log_ratio_BCHW
    means_BCHW = (q.mean_BCHW - p.mean_BCHW).square() * torch.exp(-p.log_variance_BCHW)
    return 0.5 * (variances_BCHW + means_BCHW)


def discretized_log_likelihood(x_BCHW: Tensor, p: Gaussian) -> Tensor:
    """Log probability, in nats, of the bin of width 2/255 around x => (B, C, H, W).

    The outermost bins of [-1, 1] extend to infinity. These are the bins of 8-bit pixels. A latent has no
    pixels, but the published models were trained with these bins.
    """
    # Ho et al. 2020, eq. 13.
    inverse_std_BCHW = torch.exp(-0.5 * p.log_variance_BCHW)
    centered_BCHW = x_BCHW - p.mean_BCHW
    below_upper_BCHW = _standard_normal_cdf((centered_BCHW + 1 / 255) * inverse_std_BCHW)
    below_lower_BCHW = _standard_normal_cdf((centered_BCHW - 1 / 255) * inverse_std_BCHW)
    probability_BCHW = torch.where(
        x_BCHW < -0.999,
        below_upper_BCHW,
        torch.where(x_BCHW > 0.999, 1 - below_lower_BCHW, below_upper_BCHW - below_lower_BCHW),
    )
    return probability_BCHW.clamp(min=1e-12).log()


def _standard_normal_cdf(x: Tensor) -> Tensor:
    # The tanh approximation of Page 1977, accurate to 2e-4; the published models were trained with it.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
