"""Pictures from a trained model: guided DDPM or DDIM sampling, a grid PNG and an npz.

    dit-scale sample runs/dit_xl2_256 --images 16 --guidance 4

Image i is a pure function of (weights, seed, i, class): each has its own noise, keyed by its number,
so pictures do not depend on the batch size or the number of processes beyond the rounding of the
matrix products.

Shapes: B images at once, C latent channels, H and W latent sides.
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


@dataclass(frozen=True)
class SamplingSettings:
    """How to draw; the defaults are the paper's protocol but for the guidance, which it varies."""

    seed: int = 0
    steps: str = "250"
    """Respacing: a number of steps, "ddim50", or a comma list."""
    method: str = "ddpm"
    guidance: float = 1.5
    guidance_channels: sampler.GuidanceChannels = "first3"
    batch: int = 32


def sample_latents(
    model: DiT, schedule: Schedule, y_B: Tensor, image_B: Tensor, settings: SamplingSettings
) -> Iterator[Tensor]:
    """Yield z_BCHW after each denoising step; the last is the sample, scaled as in training.

    `image_B` are the images' numbers, which key their noise; `schedule` is the respaced one.
    """
    latent_shape = (model.shape.in_channels, model.shape.latent_size, model.shape.latent_size)
    start_BCHW = rng.normals(settings.seed, Purpose.SAMPLE_START, image_B, latent_shape)

    def step_noise(step: int) -> Tensor:
        return rng.normals(settings.seed, Purpose.SAMPLE_STEP, image_B, latent_shape, stream=step)

    predict = sampler.guided(
        model, y_B, model.shape.num_classes, settings.guidance, settings.guidance_channels
    )
    if settings.method == "ddim":
        return sampler.ddim(predict, schedule, start_BCHW)
    return sampler.ddpm(predict, schedule, start_BCHW, step_noise)


def generate(
    model: DiT,
    decoder: vae.Vae,
    schedule: Schedule,
    labels: Sequence[int],
    images: range,
    settings: SamplingSettings,
    advance: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Draw the images of these numbers => uint8 (N, height, width, 3); `labels[i]` is image i's class.

    A last batch that is short is filled up, so that all batches have one shape. `advance` is called
    after each denoising step of each batch.
    """
    device, side = schedule.timesteps.device, model.shape.image_size
    parts = [np.empty((0, side, side, 3), dtype=np.uint8)]  # a process may have no image to draw
    for start in range(images.start, images.stop, settings.batch):
        real = min(settings.batch, images.stop - start)
        numbers = [min(start + i, images.stop - 1) for i in range(settings.batch)]
        image_B = torch.tensor(numbers, device=device)
        y_B = torch.tensor([labels[number] for number in numbers], device=device)
        for z_BCHW in sample_latents(model, schedule, y_B, image_B, settings):  # noqa: B007
            advance()
        parts.append(decoder.decode(z_BCHW[:real]).cpu().numpy())
    return np.concatenate(parts)


def sample(
    source: WeightsSource,
    vae_name: str,
    labels: Sequence[int],
    settings: SamplingSettings,
    out: Path,
    engine: EngineConfig,
) -> bool:
    """Draw one image per label, spread over the processes; rank 0 writes grid.png and samples.npz.

    Returns whether this process is the one that wrote them. Raises DitScaleError for what does not fit:
    weights, VAE, classes, respacing.
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
        mine = rank_slice(len(labels), world.rank, world.size)
        total = -(-len(mine) // settings.batch) * len(schedule)
        with Progress(console=Console(stderr=True), disable=not world.is_first) as bar:
            task = bar.add_task(f"{len(labels)} images, guidance {settings.guidance}", total=total)
            images = generate(model, decoder, schedule, labels, mine, settings, lambda: bar.advance(task))
        parts = world.gather(images)
        if world.is_first:
            whole = np.concatenate(parts)
            write_npz(whole, np.asarray(labels), out / "samples.npz")
            write_grid(whole, out / "grid.png")
        return world.is_first
    finally:
        dist.stop()


def balanced_labels(classes: Sequence[int], num: int) -> list[int]:
    """Classes in turn: image i shows classes[i mod len]."""
    if not classes:
        raise ConfigError("no classes to sample")
    return [classes[i % len(classes)] for i in range(num)]
