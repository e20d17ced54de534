"""Sample images from a trained model: guided DDPM or DDIM, one image per label.

    dit-scale sample runs/dit_xl2_256 --images 16 --guidance 4

Image i is a pure function of (weights, seed, i, class). Each image has its own noise, keyed by its number,
so the batch size and the number of processes affect it only through the rounding of matrix products.

Shapes: B images per batch, N images, C latent channels, h w latent sides, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from dit_scale import dist, rng, vae
from dit_scale.config import EngineConfig
from dit_scale.data.order import rank_slice
from dit_scale.diffusion import sampler
from dit_scale.diffusion.schedule import Schedule, linear, respace
from dit_scale.errors import ConfigError
from dit_scale.inference.image_files import write_grid, write_npz
from dit_scale.inference.sources import WeightsSource, build_model
from dit_scale.models.dit import DiT
from dit_scale.rng import Purpose


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
    batch: int = 32
    """Images per batch."""


def sample_latents(
    model: DiT, schedule: Schedule, y_B: Tensor, image_B: Tensor, settings: SamplingSettings
) -> Iterator[Tensor]:
    """Yield z_BChw (fp32) after each denoising step; the last one is the sample, scaled as in training.

    y_B: class numbers, int64. image_B: image numbers, int64, which key the noise. `schedule` is respaced.
    """
    latent_shape = (model.shape.in_channels, model.shape.latent_size, model.shape.latent_size)
    start_BChw = rng.normals(settings.seed, Purpose.SAMPLE_START, image_B, latent_shape)

    def step_noise(step: int) -> Tensor:
        return rng.normals(settings.seed, Purpose.SAMPLE_STEP, image_B, latent_shape, stream=step)

    predict = sampler.guided(
        model, y_B, model.shape.num_classes, settings.guidance, settings.guidance_channels
    )
    if settings.method == "ddim":
        return sampler.ddim(predict, schedule, start_BChw)
    return sampler.ddpm(predict, schedule, start_BChw, step_noise)


def generate(
    model: DiT,
    decoder: vae.Vae,
    schedule: Schedule,
    *,
    labels: Sequence[int],
    images: range,
    settings: SamplingSettings,
    advance: Callable[[], None],
) -> np.ndarray:
    """Sample and decode the images with these numbers => (N, H, W, 3) uint8; image i has class labels[i].

    The last batch is padded, so all batches have the same shape. `advance` is called after each denoising
    step of each batch.
    """
    device, side = schedule.timesteps.device, model.shape.image_size
    parts = [np.empty((0, side, side, 3), dtype=np.uint8)]  # a process may have no images to sample
    for start in range(images.start, images.stop, settings.batch):
        num_real = min(settings.batch, images.stop - start)
        numbers = [min(start + i, images.stop - 1) for i in range(settings.batch)]
        image_B = torch.tensor(numbers, device=device)
        y_B = torch.tensor([labels[number] for number in numbers], device=device)
        for z_BChw in sample_latents(model, schedule, y_B, image_B, settings):  # noqa: B007
            advance()
        parts.append(decoder.decode(z_BChw[:num_real]).cpu().numpy())
    return np.concatenate(parts)


def sample(
    source: WeightsSource,
    labels: Sequence[int],
    settings: SamplingSettings,
    *,
    vae_name: str,
    out: Path,
    engine: EngineConfig,
) -> bool:
    """Sample one image per label on all processes; rank 0 writes grid.png and samples.npz to `out`.

    Returns whether this process wrote them. Raises DitScaleError if the weights, VAE, classes or respacing
    do not match.
    """
    bad = [label for label in labels if not 0 <= label < source.model.num_classes]
    if bad:
        raise ConfigError(f"class {bad[0]}: expected 0 to {source.model.num_classes - 1}")
    world = dist.start(engine)
    try:
        precision = dist.choose_precision(engine.precision, world.device)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = build_model(source, world.device, dtype)
        decoder = vae.load(vae_name, world.device)
        decoder.require_weights(source.vae_sha256)
        schedule = respace(linear(source.timesteps), settings.steps).to(world.device)
        own_images = rank_slice(len(labels), world.rank, world.size)
        num_steps = -(-len(own_images) // settings.batch) * len(schedule)
        with Progress(console=Console(stderr=True), disable=not world.is_first) as bar:
            task = bar.add_task(f"{len(labels)} images, guidance {settings.guidance}", total=num_steps)
            own_NHW3 = generate(
                model,
                decoder,
                schedule,
                labels=labels,
                images=own_images,
                settings=settings,
                advance=lambda: bar.advance(task),
            )
        parts = world.gather(own_NHW3)
        if world.is_first:
            images_NHW3 = np.concatenate(parts)
            write_npz(images_NHW3, np.asarray(labels), out / "samples.npz")
            write_grid(images_NHW3, out / "grid.png")
        return world.is_first
    finally:
        dist.stop()


def balanced_labels(classes: Sequence[int], num: int) -> list[int]:
    """Cycle through the classes: image i gets classes[i mod len(classes)]."""
    if not classes:
        raise ConfigError("no classes to sample")
    return [classes[i % len(classes)] for i in range(num)]
