"""Names of samplers, timestep spacings, guided channels and metrics, for configurations and commands."""

from typing import Literal, get_args

Method = Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]
"""Sampler; `dit_scale.diffusion.methods` has a function for each."""
Spacing = Literal["uniform", "quadratic", "logsnr"]
"""How a respacing spreads its timesteps; `dit_scale.diffusion.spacing` defines each."""
GuidanceChannels = Literal["first3", "all"]
"""Latent channels that classifier-free guidance changes."""

METHODS: tuple[str, ...] = get_args(Method)
SPACINGS: tuple[str, ...] = get_args(Spacing)
GUIDANCE_CHANNELS: tuple[str, ...] = get_args(GuidanceChannels)
METRICS = ("frechet", "sfid", "is", "kid", "neighbours")
"""Groups of figures of an evaluation; neighbours are precision, recall, density and coverage."""
