"""The Gaussians of the diffusion: what noising does, what one step back is, how far two of them are apart.

Pure functions of tensors; `t_B` are indices into the schedule at hand (for a respaced one not the
timesteps that the model is told). Tables are fp32, so results are fp32 whatever the inputs are.

Legend: B batch, C latent channels, H W latent height and width, 2C eps then v channels, T steps.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dit_scale.diffusion.schedule import Schedule


class Gaussian(NamedTuple):
    """A diagonal Gaussian over a latent."""

    mean_BCHW: Tensor
    log_variance_BCHW: Tensor


def at(table_T: Tensor, t_B: Tensor) -> Tensor:
    """The table's entry of each sample, shaped (B, 1, 1, 1); gathers on the device, reads nothing back."""
    return table_T[t_B][:, None, None, None]


def split_output(output_B2CHW: Tensor) -> tuple[Tensor, Tensor]:
    """The model's output => (eps_BCHW, v_BCHW) in fp32: predicted noise, then the variance's position."""
    eps_BCHW, v_BCHW = output_B2CHW.float().chunk(2, dim=1)
    return eps_BCHW, v_BCHW


def q_sample(schedule: Schedule, x_start_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
    """x_t, the clean latent after t + 1 steps of noise."""
    # Ho et al. 2020, eq. 4.
    return (
        at(schedule.sqrt_alphas_cumprod, t_B) * x_start_BCHW
        + at(schedule.sqrt_one_minus_alphas_cumprod, t_B) * noise_BCHW
    )


def q_posterior(schedule: Schedule, x_start_BCHW: Tensor, x_t_BCHW: Tensor, t_B: Tensor) -> Gaussian:
    """q(x_{t-1} | x_t, x_start); its log variance (clipped at index 0) is (B, 1, 1, 1)."""
    # Ho et al. 2020, eq. 6 and 7.
    mean_BCHW = (
        at(schedule.posterior_mean_coef_start, t_B) * x_start_BCHW
        + at(schedule.posterior_mean_coef_t, t_B) * x_t_BCHW
    )
    return Gaussian(mean_BCHW, at(schedule.posterior_log_variance_clipped, t_B))


def predict_x_start(schedule: Schedule, x_t_BCHW: Tensor, t_B: Tensor, eps_BCHW: Tensor) -> Tensor:
    """The clean latent that x_t and its noise imply; never clipped, a latent has no known range."""
    # Ho et al. 2020, eq. 15.
    return (
        at(schedule.sqrt_recip_alphas_cumprod, t_B) * x_t_BCHW
        - at(schedule.sqrt_recipm1_alphas_cumprod, t_B) * eps_BCHW
    )


def learned_range_log_variance(schedule: Schedule, v_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """Log variance between the posterior's (v = -1) and beta (v = 1); v may lie outside."""
    # Nichol & Dhariwal 2021, eq. 15.
    share_BCHW = (v_BCHW + 1) / 2
    log_betas_B111 = at(schedule.log_betas, t_B)
    return share_BCHW * log_betas_B111 + (1 - share_BCHW) * at(schedule.posterior_log_variance_clipped, t_B)


def p_mean_variance(
    schedule: Schedule, eps_BCHW: Tensor, v_BCHW: Tensor, x_t_BCHW: Tensor, t_B: Tensor
) -> Gaussian:
    """p(x_{t-1} | x_t), the model's step back."""
    # Ho et al. 2020, eq. 11.
    x_start_BCHW = predict_x_start(schedule, x_t_BCHW, t_B, eps_BCHW)
    mean_BCHW = q_posterior(schedule, x_start_BCHW, x_t_BCHW, t_B).mean_BCHW
    return Gaussian(mean_BCHW, learned_range_log_variance(schedule, v_BCHW, t_B))


def normal_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of each element, in nats."""
    log_ratio_BCHW = q.log_variance_BCHW - p.log_variance_BCHW
    # expm1 keeps the digits where the two variances are nearly the same (late timesteps).
    variances_BCHW = torch.expm1(log_ratio_BCHW) - log_ratio_BCHW
    means_BCHW = (q.mean_BCHW - p.mean_BCHW).square() * torch.exp(-p.log_variance_BCHW)
    return 0.5 * (variances_BCHW + means_BCHW)


def discretized_log_likelihood(x_BCHW: Tensor, p: Gaussian) -> Tensor:
    """Log probability, in nats, of the bin of width 2/255 around x; the outermost bins of [-1, 1] are open.

    The bins are those of 8-bit pixels. A latent is not made of pixels, but the published models were
    trained with them, so they stay.
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
    # The tanh approximation of Page 1977, within 2e-4 of the integral; the published models used it.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
