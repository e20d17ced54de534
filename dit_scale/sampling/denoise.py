"""Noise to latents to pixels, for the images of one tile.

Image i is a pure function of (weights, settings, i, class): its noise is keyed by its number. Tile k holds
the images k * tile to (k + 1) * tile - 1 and is always computed as one batch of this shape, so an image has
the same bits whichever process computes it.

Shapes: B images of a tile, N real images among them, C latent channels, h w latent sides, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dit_scale import rng, vae
from dit_scale.diffusion.guidance import guided
from dit_scale.diffusion.methods import SAMPLERS
from dit_scale.diffusion.schedule import Schedule, linear, respace
from dit_scale.models.dit import DiT
from dit_scale.rng import Purpose
from dit_scale.sampling.settings import SamplingSettings


def sampling_schedule(timesteps: int, settings: SamplingSettings, device: torch.device | str) -> Schedule:
    """Return the schedule of `settings` for a model trained with this number of timesteps, on `device`.

    Raises ConfigError for steps that the spacing cannot give.
    """
    return respace(linear(timesteps), settings.steps, settings.spacing).to(device)


def denoise(
    model: DiT, schedule: Schedule, y_B: Tensor, image_B: Tensor, settings: SamplingSettings
) -> Iterator[Tensor]:
    """Yield z_BChw (fp32) after each denoising step; the last one is the sample, scaled as in training.

    y_B: class numbers, int64. image_B: image numbers, int64, which key the noise. `schedule` is respaced.
    """
    latent_shape = (model.shape.in_channels, model.shape.latent_size, model.shape.latent_size)
    start_BChw = rng.normals(settings.seed, Purpose.SAMPLE_START, image_B, latent_shape)

    def step_noise(step: int) -> Tensor:
        return rng.normals(settings.seed, Purpose.SAMPLE_STEP, image_B, latent_shape, stream=step)

    predict = guided(
        model,
        y_B,
        null_class=model.shape.num_classes,
        scale=settings.guidance,
        guidance_channels=settings.guidance_channels,
        interval=settings.guidance_interval,
    )
    return SAMPLERS[settings.method](predict, schedule, start_BChw, step_noise)


def sample_tile(
    model: DiT,
    decoder: vae.Vae,
    schedule: Schedule,
    *,
    labels: Sequence[int],
    images: range,
    settings: SamplingSettings,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample and decode the images of a tile => (N, H, W, 3) uint8, on the device.

    `images` are their numbers, at most `settings.tile`; image i has class labels[i]. A short tile is padded
    with its last image. `advance` is called after each denoising step.
    """
    device = schedule.timesteps.device
    numbers = [min(images.start + i, images.stop - 1) for i in range(settings.tile)]
    image_B = torch.tensor(numbers, device=device)
    y_B = torch.tensor([labels[number] for number in numbers], device=device)
    with vae.plain_convolutions():
        for z_BChw in denoise(model, schedule, y_B, image_B, settings):  # noqa: B007
            advance()
    return decoder.decode(z_BChw)[: len(images)]
