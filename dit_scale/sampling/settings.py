"""How images are sampled: everything that their pixels depend on besides weights, VAE and labels."""

from dataclasses import dataclass

from dit_scale.choices import GUIDANCE_CHANNELS, METHODS, SPACINGS, GuidanceChannels, Method, Spacing
from dit_scale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How to sample. The defaults are the paper's protocol for guided samples.

    Raises ConfigError for a value that is not among its choices.
    """

    seed: int = 0
    steps: str = "250"
    """Respacing: a number of steps; for uniform spacing also "ddim50" or numbers per section, "10,15,20"."""
    method: Method = "ddpm"
    """Sampler: "ddpm", "ddim", "dpmpp_2m" (DPM-Solver++ 2M), "dpmpp_2m_sde" or "unipc"."""
    spacing: Spacing = "uniform"
    """How the steps are spread: "uniform", "quadratic" or "logsnr"."""
    guidance: float = 1.5
    """Classifier-free guidance scale; 1 disables guidance."""
    guidance_channels: GuidanceChannels = "first3"
    """Latent channels to guide: "first3" or "all"."""
    guidance_interval: tuple[int, int] | None = None
    """First and last timestep of the training diffusion that are guided, inclusive; None: all of them."""
    tile: int = 32
    """Images per forward pass. All passes have this shape, so it determines the last bits."""

    def __post_init__(self) -> None:
        choices = {"method": METHODS, "spacing": SPACINGS, "guidance_channels": GUIDANCE_CHANNELS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low <= high:
                raise ConfigError(
                    f"guidance interval {low} to {high}: expected two timesteps of the training diffusion, "
                    "0 <= first <= last"
                )
