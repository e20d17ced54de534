"""Sample images from a trained model: guided DDPM or DDIM, one image per label.

    dit-scale sample runs/dit_xl2_256 --images 16 --guidance 4

Image i is a pure function of (weights, seed, i, class). Each image has its own noise, keyed by its number,
so the batch size and the number of processes affect it only through the rounding of matrix products.

Shapes: B images per batch, N images, C latent channels, h w latent sides, H W pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from dit_scale import dist, vae
from dit_scale.config import EngineConfig
from dit_scale.data.order import rank_slice
from dit_scale.errors import ConfigError
from dit_scale.inference.sources import WeightsSource, build_model
from dit_scale.sampling.denoise import sample_tile, sampling_schedule
from dit_scale.sampling.image_files import write_grid, write_npz
from dit_scale.sampling.settings import SamplingSettings


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
        schedule = sampling_schedule(source.timesteps, settings, world.device)
        own_images = rank_slice(len(labels), world.rank, world.size)
        tiles = [
            range(start, min(start + settings.tile, own_images.stop))
            for start in range(own_images.start, own_images.stop, settings.tile)
        ]
        num_steps = len(tiles) * len(schedule)
        side = model.shape.image_size
        parts = [np.empty((0, side, side, 3), dtype=np.uint8)]  # a process may have no images to sample
        with Progress(console=Console(stderr=True), disable=not world.is_first) as bar:
            task = bar.add_task(f"{len(labels)} images, guidance {settings.guidance}", total=num_steps)
            for tile in tiles:
                tile_NHW3 = sample_tile(
                    model,
                    decoder,
                    schedule,
                    labels=labels,
                    images=tile,
                    settings=settings,
                    advance=lambda: bar.advance(task),
                )
                parts.append(tile_NHW3.cpu().numpy())
        own_NHW3 = np.concatenate(parts)
        parts = world.gather(own_NHW3)
        if world.is_first:
            images_NHW3 = np.concatenate(parts)
            write_npz(images_NHW3, np.asarray(labels), out / "samples.npz")
            write_grid(images_NHW3, out / "grid.png")
        return world.is_first
    finally:
        dist.stop()
