"""The samplers by name: the one list behind `--sampler`, configurations and settings."""

from collections.abc import Callable, Iterator

from torch import Tensor

from dit_scale.choices import Method
from dit_scale.diffusion.multistep import dpmpp_2m, dpmpp_2m_sde, unipc
from dit_scale.diffusion.sampler import Noise, Predict, ddim, ddpm
from dit_scale.diffusion.schedule import Schedule

Sampler = Callable[[Predict, Schedule, Tensor, Noise], Iterator[Tensor]]
"""(predict, respaced schedule, x_T_BCHW, noise) => x_BCHW after each step."""
Solver = Callable[[Predict, Schedule, Tensor], Iterator[Tensor]]
"""A deterministic sampler, which needs no noise."""


def _without_noise(solver: Solver) -> Sampler:
    return lambda predict, schedule, x_T_BCHW, _: solver(predict, schedule, x_T_BCHW)


SAMPLERS: dict[Method, Sampler] = {
    "ddpm": ddpm,
    "ddim": _without_noise(ddim),
    "dpmpp_2m": _without_noise(dpmpp_2m),
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": _without_noise(unipc),
}
"""Name => sampler."""
