"""Whole trajectories of every sampler against the schedulers of diffusers, with a real model and guidance.

The schedulers get our timesteps and float64 noise levels. Their options make them solve the same equations:
the last step goes to sigma = 0 (diffusers' `final_sigmas_type="zero"`, `set_alpha_to_one`) and is of first
order, as `lower_order_final` and a final sigma of 0 make it. What diffusers does by default is different:
its spacings do not keep timestep 0, and fp32 tables lose digits at high noise.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_scale.choices import GuidanceChannels, Method
from dit_scale.config import ModelConfig
from dit_scale.diffusion.guidance import Interval, guided
from dit_scale.diffusion.methods import SAMPLERS
from dit_scale.diffusion.sampler import Predict
from dit_scale.diffusion.schedule import Schedule, float64_tables, linear, respace
from dit_scale.models.dit import DiT, build

FULL = linear(1000)
BETAS = {"beta_start": 1e-4, "beta_end": 2e-2}
LIMIT = 1e-5
"""Largest difference, relative to the largest |x| of the step."""

Step = Callable[[Tensor, int, Tensor], Tensor]
"""(output_B2CHW, step, x_BCHW) => x_BCHW after the step."""


@pytest.fixture(scope="module")
def model() -> DiT:
    model = build(ModelConfig(name="DiT-Nano/2", image_size=32, num_classes=10), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # the initial output is zero
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def randn(seed: int) -> Tensor:
    return torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def step_noise(step: int) -> Tensor:
    return randn(1000 + step)


def ddpm_of_diffusers(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> Step:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**BETAS, variance_type="learned_range", clip_sample=False)
    scheduler.alphas_cumprod = torch.from_numpy(float64_tables(FULL.betas_float64)["alphas_cumprod"])
    scheduler.set_timesteps(timesteps=schedule.timesteps.flip(0).tolist())

    def take(output_B2CHW: Tensor, step: int, x_BCHW: Tensor) -> Tensor:
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: step_noise(step)
        )
        return scheduler.step(output_B2CHW, scheduler.timesteps[step], x_BCHW).prev_sample

    return take


def ddim_of_diffusers(schedule: Schedule, _: pytest.MonkeyPatch) -> Step:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    scheduler.alphas_cumprod = torch.from_numpy(float64_tables(FULL.betas_float64)["alphas_cumprod"])
    scheduler.set_timesteps(len(schedule))
    assert scheduler.timesteps.tolist() == schedule.timesteps.flip(0).tolist()
    return lambda output_B2CHW, step, x_BCHW: (
        scheduler.step(output_B2CHW[:, :4], int(scheduler.timesteps[step]), x_BCHW).prev_sample
    )


def set_levels(scheduler: Any, schedule: Schedule) -> None:
    """Give a multistep scheduler our timesteps and noise levels; UniPC's set_timesteps takes no list."""
    scheduler.num_inference_steps = len(schedule)
    alphas_cumprod = float64_tables(schedule.betas_float64)["alphas_cumprod"][::-1].copy()
    sigmas = torch.from_numpy(((1 - alphas_cumprod) / alphas_cumprod) ** 0.5)
    scheduler.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    scheduler.timesteps = schedule.timesteps.flip(0)


def multistep_of_diffusers(name: str) -> Callable[[Schedule, pytest.MonkeyPatch], Step]:
    def make(schedule: Schedule, _: pytest.MonkeyPatch) -> Step:
        import diffusers

        scheduler = getattr(diffusers, name)(**BETAS, solver_order=2, final_sigmas_type="zero")
        set_levels(scheduler, schedule)
        return lambda output_B2CHW, step, x_BCHW: scheduler.step(
            output_B2CHW[:, :4], scheduler.timesteps[step], x_BCHW
        ).prev_sample.float()

    return make


def stochastic_multistep_of_diffusers(schedule: Schedule, _: pytest.MonkeyPatch) -> Step:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **BETAS, solver_order=2, final_sigmas_type="zero", algorithm_type="sde-dpmsolver++"
    )
    set_levels(scheduler, schedule)
    return lambda output_B2CHW, step, x_BCHW: scheduler.step(
        output_B2CHW[:, :4], scheduler.timesteps[step], x_BCHW, variance_noise=step_noise(step)
    ).prev_sample.float()


THEIRS: dict[Method, Callable[[Schedule, pytest.MonkeyPatch], Step]] = {
    "ddpm": ddpm_of_diffusers,
    "ddim": ddim_of_diffusers,
    "dpmpp_2m": multistep_of_diffusers("DPMSolverMultistepScheduler"),
    "dpmpp_2m_sde": stochastic_multistep_of_diffusers,
    "unipc": multistep_of_diffusers("UniPCMultistepScheduler"),
}


def largest_difference(method: Method, schedule: Schedule, predict: Predict, theirs: Step) -> float:
    """Largest difference over all steps, relative to the largest |x| of the step."""
    x_BCHW, worst = randn(0), 0.0
    timesteps = schedule.timesteps.flip(0).tolist()
    ours = SAMPLERS[method](predict, schedule, randn(0), step_noise)
    for step, ours_BCHW in enumerate(ours):
        x_BCHW = theirs(predict(x_BCHW, timesteps[step]), step, x_BCHW).float()
        worst = max(worst, float((ours_BCHW - x_BCHW).abs().max() / x_BCHW.abs().max()))
    return worst


SCHEDULES: list[tuple[Method, str, str]] = [
    ("ddpm", "50", "logsnr"),
    ("ddim", "ddim50", "uniform"),
    ("dpmpp_2m", "20", "uniform"),
    ("dpmpp_2m", "20", "logsnr"),
    ("dpmpp_2m", "5", "quadratic"),
    ("dpmpp_2m_sde", "20", "logsnr"),
    ("unipc", "20", "uniform"),
    ("unipc", "20", "logsnr"),
    ("unipc", "5", "quadratic"),
]
GUIDANCE: list[tuple[GuidanceChannels, Interval | None]] = [
    ("first3", None),
    ("first3", (200, 600)),
    ("all", None),
    ("all", (200, 600)),
]


@pytest.mark.parametrize(
    ("method", "spec", "spacing", "channels", "interval"),
    [("ddpm", "250", "uniform", "first3", None), *(s + g for s in SCHEDULES for g in GUIDANCE)],
)
def test_trajectories_are_those_of_diffusers(
    model: DiT,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    spec: str,
    spacing: str,
    channels: GuidanceChannels,
    interval: Interval | None,
) -> None:
    schedule, y_B = respace(FULL, spec, spacing), torch.tensor([1, 5, 9])
    predict = guided(
        model,
        y_B,
        null_class=10,
        scale=1.5,
        guidance_channels=channels,
        interval=interval,
    )
    theirs = THEIRS[method](schedule, monkeypatch)
    with torch.no_grad():
        worst = largest_difference(method, schedule, predict, theirs)
    print(f"{method} {spec} {spacing}, guidance on {channels} in {interval}: {worst:.1e}")
    assert worst < LIMIT


def test_another_solver_is_another_trajectory(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: DPM-Solver++ is far from UniPC of the same number of steps."""
    schedule = respace(FULL, "20")
    predict = guided(model, torch.tensor([1, 5, 9]), 10, 1.5, "first3")
    with torch.no_grad():
        worst = largest_difference("unipc", schedule, predict, THEIRS["dpmpp_2m"](schedule, monkeypatch))
    assert worst > 100 * LIMIT  # measured: 7e-3
