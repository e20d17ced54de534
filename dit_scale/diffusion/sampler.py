"""DDPM and DDIM samplers, and the terms that all samplers share.

    predict = guided(model, y_B, null_class=1000, scale=1.5, guidance_channels="first3")
    for x_BCHW in tqdm(ddpm(predict, respace(linear(1000), "250"), x_T, noise), total=250):
        pass  # the last x_BCHW is the sample

Samplers are generators that yield x after each step. DDPM gets its noise from `noise(step)`; step 0 is the
first denoising step, and the last step needs no noise. DDIM is deterministic.

All coefficients are computed on the host in float64 and enter the tensor operations as fp32 scalars. A step
therefore reads nothing back from the device, and launches only the operations on x.

Shapes: B batch, C latent channels, H W latent height and width, 2C eps then v channels, S steps.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dit_scale.diffusion.gaussian import split_output
from dit_scale.diffusion.schedule import Schedule, float64_tables

Predict = Callable[[Tensor, int], Tensor]
"""(x_BCHW, timestep) => output_B2CHW; the timestep is that of the unrespaced diffusion."""
Noise = Callable[[int], Tensor]
"""Number of steps taken so far => standard normal noise of the shape of x."""


@torch.no_grad()
def ddpm(predict: Predict, schedule: Schedule, x_T_BCHW: Tensor, noise: Noise) -> Iterator[Tensor]:
    """Ancestral sampling with the learned variance; yields x_BCHW after each of len(schedule) steps.

    `schedule` is the respaced schedule. x is fp32 and never clipped. The last step returns the mean without
    noise.
    """
    tables = float64_tables(schedule.betas_float64)
    betas_S = schedule.betas_float64
    # Ho et al. 2020, eq. 11: the mean as a sum of x and eps.
    weights_of_x_S = 1 / np.sqrt(1 - betas_S)
    weights_of_eps_S = betas_S * weights_of_x_S / tables["sqrt_one_minus_alphas_cumprod"]
    # Nichol & Dhariwal 2021, eq. 15: half the log variance as a linear function of v.
    upper_S, lower_S = tables["log_betas"], tables["posterior_log_variance_clipped"]
    centers_S, slopes_S = (upper_S + lower_S) / 4, (upper_S - lower_S) / 4
    timesteps = schedule.timesteps.tolist()
    x_BCHW = x_T_BCHW
    for step, index in enumerate(reversed(range(len(schedule)))):
        eps_BCHW, v_BCHW = split_output(predict(x_BCHW, timesteps[index]))
        x_BCHW = float(weights_of_x_S[index]) * x_BCHW - float(weights_of_eps_S[index]) * eps_BCHW
        # Ho et al. 2020, Algorithm 2.
        if index > 0:
            std_BCHW = torch.exp(float(centers_S[index]) + float(slopes_S[index]) * v_BCHW)
            x_BCHW = x_BCHW + std_BCHW * noise(step)
        yield x_BCHW


@torch.no_grad()
def ddim(predict: Predict, schedule: Schedule, x_T_BCHW: Tensor) -> Iterator[Tensor]:
    """DDIM sampling with eta = 0; yields x_BCHW after each step. It ignores the learned variance."""
    tables = float64_tables(schedule.betas_float64)
    # Song et al. 2021, eq. 12 with sigma_t = 0, as a sum of x and eps.
    signals_S, noises_S = np.sqrt(tables["alphas_cumprod_prev"]), np.sqrt(1 - tables["alphas_cumprod_prev"])
    weights_of_x_S = signals_S / tables["sqrt_alphas_cumprod"]
    weights_of_eps_S = noises_S - signals_S * tables["sqrt_recipm1_alphas_cumprod"]
    timesteps = schedule.timesteps.tolist()
    x_BCHW = x_T_BCHW
    for index in reversed(range(len(schedule))):
        eps_BCHW, _ = split_output(predict(x_BCHW, timesteps[index]))
        x_BCHW = float(weights_of_x_S[index]) * x_BCHW + float(weights_of_eps_S[index]) * eps_BCHW
        yield x_BCHW
