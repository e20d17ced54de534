"""Train the demo's VAE: a tiny AutoencoderKL that, like Stable Diffusion's, downsamples by 8 to 4 channels.

    python demo/train_vae.py

rewrites demo/vae, which ships trained, so you do not need to run this. It takes several minutes on one
core. The same seed on the same type of machine gives the same weights. Training uses 80 % of the digits,
original and mirrored; the final report uses the other 20 %. Rows of originals above their reconstructions
are written to runs/vae/reconstructions.png. One of the four channels carries the digit and the others
little, because one number per 8 x 8 pixels describes an enlarged digit completely.

The loss is |x - x'|^2 + KL_WEIGHT * KL(posterior || N(0, 1)), each term averaged over its elements.

Shapes: B images, C latent channels, H W pixels, h w = H/8 W/8 latents.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from digits import crops, split, to_levels
from rich.console import Console
from score import fit_classifier
from torch import Tensor
from torch.nn import functional

from dit_scale import vae
from dit_scale.data.pixels import Pixels
from dit_scale.errors import DitScaleError
from dit_scale.sampling.image_files import write_grid

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

IMAGE_SIZE = 64
WIDTHS = (8, 8, 16, 32)
"""Channels per level, from 64 x 64 to 8 x 8; four levels downsample by 8."""
KL_WEIGHT = 1e-5
"""Small enough that channels without information are nearly constant instead of noise: otherwise a diffusion
model would spend most of its loss on noise and take longer to learn the digits."""
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
BATCH = 16
MAX_BYTES = 1_000_000
"""Limit on the size of demo/vae, which is part of the repository."""

console = Console(markup=False, emoji=False)


def build() -> "AutoencoderKL":
    """Create an untrained VAE."""
    from diffusers import AutoencoderKL

    levels = len(WIDTHS)
    return AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
    )


def to_input(pixels_BHW3: Pixels) -> Tensor:
    """Convert uint8 pixels (B, H, W, 3) => (B, 3, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then cosine decay to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model: "AutoencoderKL", x_N3HW: Tensor, steps: int) -> None:
    """Train in place on batches drawn with replacement; each image is mirrored with probability 1/2."""
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        x_B3HW = x_N3HW[torch.randint(len(x_N3HW), (BATCH,))]
        is_mirrored_B111 = torch.rand(BATCH, 1, 1, 1) < 0.5
        x_B3HW = torch.where(is_mirrored_B111, x_B3HW.flip(3), x_B3HW)
        posterior = model.encode(x_B3HW).latent_dist
        error = functional.mse_loss(model.decode(posterior.sample()).sample, x_B3HW)
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # diffusers sums it over C, h and w
        optimizer.zero_grad()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            console.print(
                f"step {step + 1:5d}/{steps}  error {error.item():.5f}  kl {kl.item():.3f}  {seconds:5.0f} s"
            )


@torch.no_grad()
def latent_std(model: "AutoencoderKL", x_N3HW: Tensor) -> float:
    """Standard deviation of posterior samples over all images, channels and positions."""
    moments = [model.encode(x_B3HW).latent_dist for x_B3HW in x_N3HW.split(64)]
    mean = torch.cat([posterior.mean for posterior in moments])
    std = torch.cat([posterior.std for posterior in moments])
    return math.sqrt((mean.square() + std.square()).mean().item() - mean.mean().item() ** 2)


def save(model: "AutoencoderKL", folder: Path) -> None:
    """Write config.json and safetensors weights, and check that they fit into the repository."""
    model.save_pretrained(folder, safe_serialization=True)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{folder}: {num_bytes:,} bytes, {num_parameters:,} parameters")
    assert num_bytes < MAX_BYTES, f"{num_bytes} bytes is more than {MAX_BYTES}; choose smaller WIDTHS"


def round_trip(autoencoder: vae.Vae, pixels_NHW3: Pixels) -> tuple[Pixels, Tensor]:
    """Encode, and decode the posterior means => pixels and moments (N, 2C, h, w); print the times."""
    started = time.monotonic()
    moments = torch.cat([autoencoder.encode(x_B3HW) for x_B3HW in to_input(pixels_NHW3).split(32)])
    encoded = time.monotonic()
    means = moments.chunk(2, dim=1)[0] * autoencoder.scale
    pixels = torch.cat([autoencoder.decode(z_BChw) for z_BChw in means.split(32)]).numpy()
    decoded = time.monotonic()
    console.print(
        f"{len(pixels)} images: encoded in {encoded - started:.1f} s, decoded in {decoded - encoded:.1f} s"
    )
    return pixels, moments


def report(folder: Path, pixels_NHW3: Pixels, labels_N: np.ndarray, picture: Path) -> None:
    """Load the saved VAE as the pipeline does, and report its quality on held-out digits."""
    autoencoder = vae.load(folder)
    rebuilt_NHW3, moments = round_trip(autoencoder, pixels_NHW3)
    fit, held_out = split(labels_N)
    classifier = fit_classifier(to_levels(pixels_NHW3[fit]), labels_N[fit])
    for name, images in (("originals", pixels_NHW3), ("reconstructions", rebuilt_NHW3)):
        share = classifier.share_recognised(to_levels(images[held_out]), labels_N[held_out])
        console.print(f"held-out {name}: {share:.2%} recognised")
    error = to_levels(rebuilt_NHW3[held_out]) - to_levels(pixels_NHW3[held_out])
    console.print(f"held-out error: {np.sqrt(np.mean(error**2)):.3f} of 16 grey levels in 8 x 8 pixels")
    mean, std = moments.chunk(2, dim=1)
    for name, values in (
        ("mean", mean.mean((0, 2, 3))),
        ("std of the mean", mean.std((0, 2, 3))),
        ("std of the posterior", std.mean((0, 2, 3))),
    ):
        console.print(f"latent {name} per channel: " + " ".join(f"{value:.3f}" for value in values.tolist()))
    shown = held_out[:: len(held_out) // 50][:50].reshape(5, 10)
    write_grid(np.concatenate([part[row] for row in shown for part in (pixels_NHW3, rebuilt_NHW3)]), picture)
    console.print(f"originals above reconstructions: {picture}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the demo's small VAE on the digits.")
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parent / "vae", help="output folder (default demo/vae)"
    )
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of 16 images (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("runs/vae/reconstructions.png"),
        help="image of originals and reconstructions (default runs/vae/reconstructions.png)",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="report on the existing VAE without training"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the weights depend on the number of threads
    pixels_NHW3, labels_N = crops(IMAGE_SIZE)
    try:
        if not arguments.report_only:
            torch.manual_seed(arguments.seed)
            model = build()
            fit, _ = split(labels_N)
            train(model, to_input(pixels_NHW3[fit]), arguments.steps)
            model.eval()
            model.register_to_config(scaling_factor=round(1 / latent_std(model, to_input(pixels_NHW3)), 5))
            save(model, arguments.folder)
        report(arguments.folder, pixels_NHW3, labels_N, arguments.picture)
    except DitScaleError as error:
        console.print(f"error: {error}", style="red")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
