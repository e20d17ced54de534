"""DDPM and DDIM samplers, and classifier-free guidance.

    predict = guided(model, y_B, null_class=1000, scale=1.5, guidance_channels="first3")
    for x_BCHW in tqdm(ddpm(predict, respace(linear(1000), "250"), x_T, noise), total=250):
        pass  # the last x_BCHW is the sample

Both samplers are generators that yield x after each step. DDPM gets its noise from `noise(step)`; step 0
is the first denoising step, and the last step needs no noise. DDIM is deterministic.

Shapes: B batch, C latent channels, H W latent height and width, 2C eps then v channels, D = 2B.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dit_scale.diffusion.gaussian import p_mean_variance, predict_x_start, split_output
from dit_scale.diffusion.schedule import Schedule, float64_tables
from dit_scale.errors import ConfigError

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_BCHW, timestep_B) => output_B2CHW; timesteps of the unrespaced diffusion, int64."""
PredictWithLabels = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_BCHW, timestep_B, y_B) => output_B2CHW."""
Noise = Callable[[int], Tensor]
"""Number of steps taken so far => standard normal noise of the shape of x."""
GuidanceChannels = Literal["first3", "all"]


@torch.no_grad()
def ddpm(predict: Predict, schedule: Schedule, x_T_BCHW: Tensor, noise: Noise) -> Iterator[Tensor]:
    """Ancestral sampling with the learned variance; yields x_BCHW after each of len(schedule) steps.

    `schedule` is the respaced schedule, on the device of x. x is fp32 and never clipped. The last step
    returns the mean without noise.
    """
    x_BCHW = x_T_BCHW
    for step, index in enumerate(reversed(range(len(schedule)))):
        t_B = _filled(x_BCHW, index)
        eps_BCHW, v_BCHW = split_output(predict(x_BCHW, schedule.timesteps[t_B]))
        p = p_mean_variance(schedule, eps_BCHW, v_BCHW, x_BCHW, t_B)
        # Ho et al. 2020, Algorithm 2, with the variance of Nichol & Dhariwal 2021, eq. 15.
        x_BCHW = p.mean_BCHW
        if index > 0:
            x_BCHW = x_BCHW + torch.exp(0.5 * p.log_variance_BCHW) * noise(step)
        yield x_BCHW


@torch.no_grad()
def ddim(predict: Predict, schedule: Schedule, x_T_BCHW: Tensor) -> Iterator[Tensor]:
    """DDIM sampling with eta = 0; yields x_BCHW after each step. It ignores the learned variance."""
    tables = float64_tables(schedule.betas_float64)
    signals_T = np.sqrt(tables["alphas_cumprod_prev"])
    directions_T = np.sqrt(1 - tables["alphas_cumprod_prev"])
    x_BCHW = x_T_BCHW
    for index in reversed(range(len(schedule))):
        t_B = _filled(x_BCHW, index)
        eps_BCHW, _ = split_output(predict(x_BCHW, schedule.timesteps[t_B]))
        x_start_BCHW = predict_x_start(schedule, x_BCHW, t_B, eps_BCHW)
        # Song et al. 2021, eq. 12 with sigma_t = 0.
        x_BCHW = float(signals_T[index]) * x_start_BCHW + float(directions_T[index]) * eps_BCHW
        yield x_BCHW


def guided(
    predict: PredictWithLabels,
    y_B: Tensor,
    null_class: int,
    scale: float,
    guidance_channels: GuidanceChannels,
) -> Predict:
    """Classifier-free guidance: eps = eps_null + scale (eps_y - eps_null), in one pass over a doubled batch.

    "first3" guides the first three eps channels, as the published DiT results do (a scale of 1.5 then acts
    like about 1.375 on all four); "all" guides every eps channel. All other channels, including the
    variance, come from the labelled half. Scale 1.0 disables guidance and skips the null half, which halves
    the cost. Raises ConfigError for another value of `guidance_channels`.
    """
    if guidance_channels not in ("first3", "all"):
        raise ConfigError(f"guidance_channels {guidance_channels!r}: expected 'first3' or 'all'")
    if scale == 1.0:
        return lambda x_BCHW, timestep_B: predict(x_BCHW, timestep_B, y_B)
    y_D = torch.cat([y_B, torch.full_like(y_B, null_class)])

    def predict_guided(x_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
        output_D2CHW = predict(torch.cat([x_BCHW, x_BCHW]), torch.cat([timestep_B, timestep_B]), y_D)
        labelled_B2CHW, null_B2CHW = output_D2CHW.float().chunk(2)
        num_guided = 3 if guidance_channels == "first3" else x_BCHW.shape[1]
        eps_labelled, eps_null = labelled_B2CHW[:, :num_guided], null_B2CHW[:, :num_guided]
        # Ho & Salimans 2022, eq. 6, with scale = 1 + w.
        eps = eps_null + scale * (eps_labelled - eps_null)
        return torch.cat([eps, labelled_B2CHW[:, num_guided:]], dim=1)

    return predict_guided


def _filled(x_BCHW: Tensor, index: int) -> Tensor:
    """Return `index` once per sample, int64 on the device of x."""
    return torch.full((x_BCHW.shape[0],), index, dtype=torch.int64, device=x_BCHW.device)
