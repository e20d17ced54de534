"""Multistep solvers: DPM-Solver++(2M), its stochastic variant, and UniPC-2.

They integrate the predicted x_start exponentially over half the log SNR, lambda = log(alpha / sigma), where
x_t = alpha x_start + sigma eps. They reuse earlier predictions, so a step costs one pass of the model, as in
DDIM. They ignore the learned variance. All but the variant are deterministic.

    for x_BCHW in unipc(predict, respace(linear(1000), "20", spacing="logsnr"), x_T):
        pass  # the last x_BCHW is the sample

The last step goes to sigma = 0. There lambda is infinite, so this step is of first order: it returns the
predicted x_start. So is the first step, which has no earlier prediction.

Shapes: B batch, C latent channels, H W latent height and width, S steps.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_scale.diffusion.gaussian import split_output
from dit_scale.diffusion.sampler import Noise, Predict
from dit_scale.diffusion.schedule import Schedule, float64_tables


class Step(NamedTuple):
    """Coefficients of one step, from noise level s to the next lower level t; python floats."""

    timestep: int
    """Timestep of the unrespaced diffusion at s."""
    alpha_s: float
    sigma_s: float
    alpha_t: float
    sigma_t: float
    h: float
    """lambda_t - lambda_s > 0; infinite in the last step."""

    def along(self, x_BCHW: Tensor, direction_BCHW: Tensor) -> Tensor:
        """Move x from s to t with a constant x_start: exact if the prediction does not change."""
        # Lu et al. 2022b, Algorithm 2; the same step as in Song et al. 2021, eq. 12.
        return (self.sigma_t / self.sigma_s) * x_BCHW - (self.alpha_t * math.expm1(-self.h)) * direction_BCHW


Prediction = tuple[Step, Tensor]
"""A step and the x_start that the model predicted at its beginning."""


@torch.no_grad()
def dpmpp_2m(predict: Predict, schedule: Schedule, x_T_BCHW: Tensor) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2), of order 2; yields x_BCHW after each step."""
    x_BCHW, earlier = x_T_BCHW, None
    for step in _steps(schedule):
        start_BCHW = _predict_x_start(predict, step, x_BCHW)
        x_BCHW = step.along(x_BCHW, _extrapolated(step, start_BCHW, earlier))
        earlier = (step, start_BCHW)
        yield x_BCHW


@torch.no_grad()
def dpmpp_2m_sde(predict: Predict, schedule: Schedule, x_T_BCHW: Tensor, noise: Noise) -> Iterator[Tensor]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, appendix); yields x_BCHW after each step.

    It solves the reverse SDE, as DDPM does: fresh noise in each step, from `noise(step)`, removes errors of
    earlier steps. The last step needs none.
    """
    x_BCHW, earlier = x_T_BCHW, None
    for number, step in enumerate(_steps(schedule)):
        start_BCHW = _predict_x_start(predict, step, x_BCHW)
        direction_BCHW = _extrapolated(step, start_BCHW, earlier)
        shrink, fresh = math.exp(-step.h) * step.sigma_t / step.sigma_s, -math.expm1(-2 * step.h)
        x_BCHW = shrink * x_BCHW + (step.alpha_t * fresh) * direction_BCHW
        if step.sigma_t > 0:
            x_BCHW = x_BCHW + (step.sigma_t * math.sqrt(fresh)) * noise(number)
        earlier = (step, start_BCHW)
        yield x_BCHW


@torch.no_grad()
def unipc(predict: Predict, schedule: Schedule, x_T_BCHW: Tensor) -> Iterator[Tensor]:
    """UniPC-2 (Zhao et al. 2023) with data prediction and B(h) = e^h - 1; yields x_BCHW after each step.

    Its predictor is the step of DPM-Solver++(2M). The prediction at the end of a step then corrects the x
    from which the next step starts, at no extra pass of the model; this raises the order to 3. x is yielded
    before its correction; the last x has none.
    """
    x_BCHW, corrected_BCHW = x_T_BCHW, x_T_BCHW
    before: list[Prediction] = []  # the last two, oldest first
    for step in _steps(schedule):
        start_BCHW = _predict_x_start(predict, step, x_BCHW)
        if before:
            last_step, _ = before[-1]
            corrected_BCHW = last_step.along(corrected_BCHW, _interpolated(start_BCHW, before))
        direction_BCHW = _extrapolated(step, start_BCHW, before[-1] if before else None)
        x_BCHW = step.along(corrected_BCHW, direction_BCHW)
        before = [*before[-1:], (step, start_BCHW)]
        yield x_BCHW


def _predict_x_start(predict: Predict, step: Step, x_BCHW: Tensor) -> Tensor:
    eps_BCHW, _ = split_output(predict(x_BCHW, step.timestep))
    # Ho et al. 2020, eq. 15.
    return (1 / step.alpha_s) * x_BCHW - (step.sigma_s / step.alpha_s) * eps_BCHW


def _extrapolated(step: Step, start_BCHW: Tensor, earlier: Prediction | None) -> Tensor:
    """Estimate x_start in the middle of a step from the predictions at its beginning and before."""
    if earlier is None or math.isinf(step.h):
        return start_BCHW
    earlier_step, earlier_start_BCHW = earlier
    # Lu et al. 2022b, Algorithm 2: D_i. It equals Zhao et al. 2023, UniP-2, with a_1 = 1/2.
    weight = step.h / (2 * earlier_step.h)
    return (1 + weight) * start_BCHW - weight * earlier_start_BCHW


def _interpolated(start_BCHW: Tensor, before: list[Prediction]) -> Tensor:
    """Estimate x_start within the last step from the prediction at its end and those before."""
    step, last_start_BCHW = before[-1]
    if len(before) == 1:  # UniC-1: a_1 = 1/2
        return 0.5 * (last_start_BCHW + start_BCHW)
    earlier_step, earlier_start_BCHW = before[-2]
    # Zhao et al. 2023, Theorem 3.1 for data prediction: R_2(h) a = b(h), solved for a, with r_2 = 1.
    r_1, growth = -earlier_step.h / step.h, math.expm1(-step.h)
    phi_1 = growth / -step.h - 1
    phi_2 = phi_1 / -step.h - 1 / 2
    b_1, b_2 = phi_1 / growth, 2 * phi_2 / growth
    a_1 = (b_1 - b_2) / (1 - r_1)
    a_2 = b_1 - a_1
    return (1 - a_1 / r_1 - a_2) * last_start_BCHW + (a_1 / r_1) * earlier_start_BCHW + a_2 * start_BCHW


def _steps(schedule: Schedule) -> Iterator[Step]:
    """Yield the steps from the noisiest level to sigma = 0."""
    alphas_cumprod_S = float64_tables(schedule.betas_float64)["alphas_cumprod"][::-1]
    alphas = [*np.sqrt(alphas_cumprod_S).tolist(), 1.0]
    sigmas = [*np.sqrt(1 - alphas_cumprod_S).tolist(), 0.0]
    lambdas = [*(0.5 * np.log(alphas_cumprod_S / (1 - alphas_cumprod_S))).tolist(), math.inf]
    for i, timestep in enumerate(reversed(schedule.timesteps.tolist())):
        yield Step(
            timestep=timestep,
            alpha_s=alphas[i],
            sigma_s=sigmas[i],
            alpha_t=alphas[i + 1],
            sigma_t=sigmas[i + 1],
            h=lambdas[i + 1] - lambdas[i],
        )
