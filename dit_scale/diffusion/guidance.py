"""Classifier-free guidance, on some channels and in some interval of timesteps.

Shapes: B batch, C latent channels, H W latent height and width, 2C eps then v channels, D = 2B.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dit_scale.choices import GUIDANCE_CHANNELS
from dit_scale.diffusion.sampler import Predict
from dit_scale.errors import ConfigError

PredictWithLabels = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_BCHW, timestep_B, y_B) => output_B2CHW."""
Interval = tuple[int, int]
"""First and last timestep of the unrespaced diffusion, both inclusive."""


def guided(
    predict: PredictWithLabels,
    y_B: Tensor,
    null_class: int,
    scale: float,
    guidance_channels: str,
    interval: Interval | None = None,
) -> Predict:
    """Classifier-free guidance: eps = eps_null + scale (eps_y - eps_null), in one pass over a doubled batch.

    "first3" guides the first three eps channels, as the published DiT results do (a scale of 1.5 then acts
    like about 1.375 on all four); "all" guides every eps channel. All other channels, including the
    variance, come from the labelled half. Outside of `interval` (Kynkaanniemi et al. 2024), and everywhere
    if the scale is 1, the model predicts with labels only, which halves the cost; None guides every
    timestep. Raises ConfigError for another value of `guidance_channels`.
    """
    if guidance_channels not in GUIDANCE_CHANNELS:
        raise ConfigError(
            f"guidance_channels {guidance_channels!r}: expected one of {', '.join(GUIDANCE_CHANNELS)}"
        )
    y_D = torch.cat([y_B, torch.full_like(y_B, null_class)])

    def predict_guided(x_BCHW: Tensor, timestep: int) -> Tensor:
        inside = interval is None or interval[0] <= timestep <= interval[1]
        if scale == 1.0 or not inside:
            return predict(x_BCHW, torch.full_like(y_B, timestep), y_B)
        output_D2CHW = predict(torch.cat([x_BCHW, x_BCHW]), torch.full_like(y_D, timestep), y_D)
        labelled_B2CHW, null_B2CHW = output_D2CHW.float().chunk(2)
        num_guided = 3 if guidance_channels == "first3" else x_BCHW.shape[1]
        eps_labelled, eps_null = labelled_B2CHW[:, :num_guided], null_B2CHW[:, :num_guided]
        # Ho & Salimans 2022, eq. 6, with scale = 1 + w.
        eps = eps_null + scale * (eps_labelled - eps_null)
        return torch.cat([eps, labelled_B2CHW[:, num_guided:]], dim=1)

    return predict_guided
