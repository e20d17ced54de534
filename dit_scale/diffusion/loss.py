"""The training loss: mean squared error of the noise, plus the variational bound that trains the variance.

    output_B2CHW = model(x_t, t_B, y_B)
    loss = hybrid_loss(schedule, output_B2CHW, x_start_BCHW=x_start, x_t_BCHW=x_t, noise_BCHW=noise, t_B=t_B)
    loss.total_B.mean().backward()

Shapes: B batch, C latent channels, H W latent height and width, 2C eps then v channels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dit_scale.diffusion.gaussian import (
    discretized_log_likelihood,
    normal_kl,
    p_mean_variance,
    q_posterior,
    split_output,
)
from dit_scale.diffusion.schedule import Schedule


class HybridLoss(NamedTuple):
    """Loss per sample, fp32, averaged over its elements; total = mse + vb."""

    total_B: Tensor
    mse_B: Tensor
    """Mean squared error of the predicted noise."""
    vb_B: Tensor
    """Variational-bound term of the sample's timestep, in bits per element."""


def hybrid_loss(
    schedule: Schedule,
    output_B2CHW: Tensor,
    *,
    x_start_BCHW: Tensor,
    x_t_BCHW: Tensor,
    noise_BCHW: Tensor,
    t_B: Tensor,
) -> HybridLoss:
    """L_hybrid with one bound term per sample at weight 1: neither scaled by 0.001 nor multiplied by T.

    The bound treats the predicted noise as a constant, so the bound trains only the v channels and the
    squared error trains only the eps channels. Latents and noise are fp32; the output may be bf16.
    """
    eps_BCHW, v_BCHW = split_output(output_B2CHW)
    # Ho et al. 2020, eq. 14.
    mse_B = (noise_BCHW - eps_BCHW).square().mean(dim=(1, 2, 3))
    vb_B = variational_bound(
        schedule, eps_BCHW.detach(), v_BCHW, x_start_BCHW=x_start_BCHW, x_t_BCHW=x_t_BCHW, t_B=t_B
    )
    # Nichol & Dhariwal 2021, eq. 16, with lambda = 1.
    return HybridLoss(mse_B + vb_B, mse_B, vb_B)


def variational_bound(
    schedule: Schedule,
    eps_BCHW: Tensor,
    v_BCHW: Tensor,
    *,
    x_start_BCHW: Tensor,
    x_t_BCHW: Tensor,
    t_B: Tensor,
) -> Tensor:
    """Variational-bound term at each sample's timestep, in bits per element => (B,) fp32.

    For t > 0 it is KL(q(x_{t-1} | x_t, x_start) || p(x_{t-1} | x_t)); at t = 0 it is -log p(x_start | x_t).
    """
    q = q_posterior(schedule, x_start_BCHW, x_t_BCHW, t_B)
    p = p_mean_variance(schedule, eps_BCHW, v_BCHW, x_t_BCHW, t_B)
    # Ho et al. 2020, eq. 5: L_{t-1} and L_0.
    kl_B = normal_kl(q, p).mean(dim=(1, 2, 3))
    decoder_nll_B = -discretized_log_likelihood(x_start_BCHW, p).mean(dim=(1, 2, 3))
    return torch.where(t_B == 0, decoder_nll_B, kl_B) / math.log(2)
