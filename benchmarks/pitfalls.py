r"""Measure what departures from the paper's protocol of evaluation cost, on a trained model.

    python -m benchmarks.pitfalls runs/demo/run --real runs/demo/images \
        --network classifier:demo/classifier.safetensors

One protocol is changed in one respect at a time: labels, guided channels, rounding, number of samples, the
resize of the images, the order for the Inception Score. All samples have the same seeds. The Frechet distance
has the standard error of ten random tenths of the samples left out in turn.

Shapes: N images, B images of a tile, C latent channels, h w latent sides, H W pixels, F features, K classes.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_scale import vae
from dit_scale.data.pixels import Pixels
from dit_scale.errors import ConfigError, DitScaleError
from dit_scale.evaluate.features import FeatureNetwork
from dit_scale.evaluate.frechet import Estimate, frechet_with_error
from dit_scale.evaluate.images import TILE, open_images
from dit_scale.evaluate.inception_score import inception_score
from dit_scale.evaluate.moments import Moments
from dit_scale.evaluate.networks import load_network
from dit_scale.evaluate.statistics import random_blocks
from dit_scale.inference.sources import build_model, open_source
from dit_scale.sampling.denoise import denoise, sampling_schedule
from dit_scale.sampling.labels import LabelChoice
from dit_scale.sampling.settings import SamplingSettings

CPU = torch.device("cpu")
BLOCKS = 10
IS_SPLITS = 10

Rounding = Callable[[Tensor], Tensor]


def of_the_paper(x_B3HW: Tensor) -> Tensor:
    """[-1, 1] to 0..255 as the paper's code rounds: 127.5 x + 128, truncated."""
    return 127.5 * x_B3HW + 128.0


def of_others(x_B3HW: Tensor) -> Tensor:
    """[-1, 1] to 0..255 as many programs do: (x + 1) / 2 * 255, truncated."""
    return (x_B3HW + 1.0) / 2.0 * 255.0


@dataclass(frozen=True)
class Row:
    """A protocol and its figures."""

    protocol: str
    images: int
    distance: Estimate | None = None
    inception_score: float | None = None


class Model:
    """The run's model and decoder."""

    def __init__(self, run: str) -> None:
        source = open_source(run)
        if source.vae is None:
            raise ConfigError(f"{run} does not name its VAE; pass a run")
        self.num_classes, self.image_size = source.model.num_classes, source.model.image_size
        self._timesteps = source.timesteps
        self._model = build_model(source, CPU, torch.float32)
        self._decoder = vae.load(source.vae)

    def sample(self, labels_N: np.ndarray, settings: SamplingSettings) -> Tensor:
        """Sample one image per label and decode it => (N, 3, H, W) fp32."""
        schedule = sampling_schedule(self._timesteps, settings, CPU)
        parts = []
        for first in range(0, len(labels_N), TILE):
            images_B = torch.arange(first, min(first + TILE, len(labels_N)))
            y_B = torch.from_numpy(labels_N[images_B.numpy()])
            with torch.inference_mode():
                (*_, z_BChw) = denoise(self._model, schedule, y_B, images_B, settings)
                parts.append(self._decoder.reconstruct(z_BChw))
        return torch.cat(parts)


class Judge:
    """A feature network and the moments of the real images."""

    def __init__(self, network: FeatureNetwork, real_NHW3: Pixels) -> None:
        self._network = network
        self._real = Moments.of(self.features(real_NHW3)[0])

    def features(self, images_NHW3: Pixels) -> tuple[np.ndarray, np.ndarray | None]:
        """Return features (N, F) and class probabilities (N, K)."""
        parts = []
        with torch.inference_mode():
            for first in range(0, len(images_NHW3), TILE):
                parts.append(self._network(torch.from_numpy(images_NHW3[first : first + TILE])))
        probabilities = [part.probabilities_NC for part in parts if part.probabilities_NC is not None]
        pool_NF = torch.cat([part.pool_NF for part in parts]).numpy()
        return pool_NF, torch.cat(probabilities).numpy() if probabilities else None

    def distance(self, images_NHW3: Pixels) -> Estimate:
        """Return the Frechet distance to the real images."""
        return frechet_with_error(random_blocks(self.features(images_NHW3)[0], BLOCKS), self._real)


def to_pixels(x_N3HW: Tensor, rounding: Rounding) -> Pixels:
    """Round to uint8 => (N, H, W, 3)."""
    pixels: Pixels = rounding(x_N3HW).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


def resized(images_NHW3: Pixels, side: int, antialias: bool) -> Pixels:
    """Resize bilinearly, with Pillow's antialias or without any."""
    if antialias:
        files = (
            Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR) for image in images_NHW3
        )
        return np.stack([np.asarray(file) for file in files])
    x_N3HW = torch.from_numpy(images_NHW3).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(x_N3HW, size=(side, side), mode="bilinear", antialias=False)
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def sample_rows(model: Model, judge: Judge, num: int, steps: str) -> list[Row]:
    """Change the protocol of samples in one respect at a time."""
    settings = SamplingSettings(method="dpmpp_2m", steps=steps, spacing="logsnr")
    drawn_N = LabelChoice().labels(num, model.num_classes, settings.seed)
    balanced_N = LabelChoice(drawn="balanced").labels(num, model.num_classes, settings.seed)
    base_N3HW = model.sample(drawn_N, settings)
    base = to_pixels(base_N3HW, of_the_paper)
    variants = {
        "the protocol": base,
        "rounding (x + 1) / 2 * 255": to_pixels(base_N3HW, of_others),
        "labels balanced": to_pixels(model.sample(balanced_N, settings), of_the_paper),
        "guidance on all channels": to_pixels(
            model.sample(drawn_N, replace(settings, guidance_channels="all")), of_the_paper
        ),
        "half of the samples": base[: num // 2],
        "a quarter of the samples": base[: num // 4],
    }
    rows = [Row(name, len(images), judge.distance(images)) for name, images in variants.items()]
    _, probabilities_NK = judge.features(base)
    if probabilities_NK is not None:
        orders = {"drawn order": np.arange(num), "sorted by class": np.argsort(drawn_N, kind="stable")}
        for name, order_N in orders.items():
            score = inception_score([probabilities_NK[order_N]], num, None, -(-num // IS_SPLITS))
            rows.append(Row(f"IS over {IS_SPLITS} splits, {name}", num, inception_score=score.mean))
    return rows


def resize_rows(network: FeatureNetwork, real_NHW3: Pixels) -> list[Row]:
    """Score half of the real images against the other half, with the same resize to half the side or not."""
    side = real_NHW3.shape[1] // 2
    judge = Judge(network, resized(real_NHW3[::2], side, antialias=True))
    rest = real_NHW3[1::2]
    return [
        Row(name, len(rest), judge.distance(resized(rest, side, antialias)))
        for name, antialias in (
            ("real images, both resized with antialias", True),
            ("real images, one half without antialias", False),
        )
    ]


def show(rows: list[Row], console: Console) -> None:
    """Print the table."""
    table = Table("protocol", "images", "FD", "IS", box=box.MARKDOWN)
    for row in rows:
        distance = f"{row.distance.value:.2f} +- {row.distance.standard_error:.2f}" if row.distance else ""
        score = "" if row.inception_score is None else f"{row.inception_score:.3f}"
        table.add_row(row.protocol, str(row.images), distance, score)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--real", required=True, help="real images, as for `dit-scale evaluate --reference`")
    parser.add_argument("--network", required=True, help="KIND:PATH of a feature network")
    parser.add_argument("--images", type=int, default=2000, help="samples per protocol (default 2000)")
    parser.add_argument("--steps", default="20", help="steps of DPM-Solver++(2M) (default 20)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        network, model = load_network(arguments.network), Model(arguments.run)
        images = open_images(arguments.real, device=CPU, crop=model.image_size)
        starts = range(0, images.count, TILE)
        real_NHW3 = np.concatenate([images.read(range(images.count)[at : at + TILE]) for at in starts])
        rows = sample_rows(model, Judge(network, real_NHW3), arguments.images, arguments.steps)
        show([*rows, *resize_rows(network, real_NHW3)], Console(width=110))
    except DitScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
