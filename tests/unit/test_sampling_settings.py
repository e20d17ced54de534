"""Settings of sampling name their choices, and every choice has its function."""

import re

import pytest
import torch

from dit_scale import choices
from dit_scale.diffusion.methods import SAMPLERS
from dit_scale.errors import ConfigError
from dit_scale.sampling.denoise import sampling_schedule
from dit_scale.sampling.settings import SamplingSettings


def test_every_method_has_a_sampler() -> None:
    assert tuple(SAMPLERS) == choices.METHODS


@pytest.mark.parametrize("spacing", choices.SPACINGS)
def test_every_spacing_gives_a_schedule(spacing: choices.Spacing) -> None:
    settings = SamplingSettings(steps="20", spacing=spacing)
    timesteps = sampling_schedule(1000, settings, "cpu").timesteps.tolist()
    assert len(timesteps) == 20
    assert (timesteps[0], timesteps[-1]) == (0, 999)


def test_the_schedule_is_on_the_device_and_of_the_trained_length() -> None:
    schedule = sampling_schedule(400, SamplingSettings(steps="40"), "meta")
    assert (len(schedule), schedule.betas.device) == (40, torch.device("meta"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "euler"}, "method 'euler': expected one of ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, unipc"),
        ({"spacing": "cosine"}, "spacing 'cosine': expected one of uniform, quadratic, logsnr"),
        ({"guidance_channels": "last"}, "guidance_channels 'last': expected one of first3, all"),
        ({"guidance_interval": (600, 200)}, "guidance interval 600 to 200: expected .* first <= last"),
        ({"guidance_interval": (-1, 200)}, "guidance interval -1 to 200"),
    ],
)
def test_other_values_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingSettings(**wrong)  # type: ignore[arg-type]


def test_steps_that_a_spacing_cannot_give_are_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("between 2 and 1000")):
        sampling_schedule(1000, SamplingSettings(steps="ddim50", spacing="quadratic"), "cpu")
