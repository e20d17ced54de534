"""How images are sampled: everything that their pixels depend on besides weights, VAE and labels."""

from dataclasses import dataclass

from dit_scale.diffusion import sampler


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How to sample. The defaults are the paper's protocol for guided samples."""

    seed: int = 0
    steps: str = "250"
    """Respacing: a number of steps, "ddim50", or comma-separated numbers per section."""
    method: str = "ddpm"
    """Sampler: "ddpm" or "ddim"."""
    guidance: float = 1.5
    """Classifier-free guidance scale; 1 disables guidance."""
    guidance_channels: sampler.GuidanceChannels = "first3"
    tile: int = 32
    """Images per forward pass. All passes have this shape, so it determines the last bits."""
