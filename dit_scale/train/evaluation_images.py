"""Samples of the weights in training: a grid to look at, and a Frechet distance.

Shapes: N images, H W pixels, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dit_scale.data.shards import LatentDataset
from dit_scale.diffusion.schedule import Schedule
from dit_scale.dist import World
from dit_scale.errors import ConfigError
from dit_scale.evaluate.cache import FeatureRows
from dit_scale.evaluate.features import FeatureNetwork
from dit_scale.evaluate.frechet import frechet_distance
from dit_scale.evaluate.images import ImageSet
from dit_scale.evaluate.moments import HasGaussian, Moments
from dit_scale.evaluate.networks import load_network
from dit_scale.evaluate.references import open_reference
from dit_scale.models.dit import DiT
from dit_scale.sampling.denoise import sample_tile, sampling_schedule
from dit_scale.sampling.labels import balanced_labels
from dit_scale.sampling.settings import SamplingSettings
from dit_scale.sections import EvaluateConfig
from dit_scale.vae import Vae, load_decoder

Features = NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """A feature network, and the reference with which the features of samples are compared."""

    network: FeatureNetwork
    reference: HasGaussian
    reference_sha256: str

    @classmethod
    def load(cls, config: EvaluateConfig, image_size: int, world: World) -> "Comparison":
        """Load both. Raises WeightsError, ConfigError or DataError if one is missing or they do not fit."""
        path = Path(config.reference)
        if path.suffix != ".npz" or not path.is_file():
            raise ConfigError(
                f"evaluate.reference={path}: expected an npz file with statistics, as `dit-scale evaluate "
                "--make-reference` writes"
            )
        reference = open_reference(str(path), _no_digest, device=world.device)
        if reference.image_size not in (None, image_size):
            raise ConfigError(
                f"evaluate.reference={path} is about images of {reference.image_size} px, and this run makes "
                f"{image_size} px: make the reference from images of that size"
            )
        network = load_network(config.network, world.device)
        pool = reference.statistics(network, _no_rows, world).pool
        return cls(network, pool, reference.description()["sha256"])

    def features(self, images_NHW3: Tensor) -> Features:
        """Return the features of images on the device of the network, (N, F)."""
        return self.network(images_NHW3).pool_NF.cpu().numpy()

    def distance(self, features_NF: Features) -> float | None:
        """Return the Frechet distance to the reference; None if a feature is not finite."""
        if not np.isfinite(features_NF).all():
            return None
        return frechet_distance(Moments.of(features_NF), self.reference)


@dataclass(frozen=True)
class Tile:
    """What a tile of images leaves behind."""

    grid_NHW3: NDArray[np.uint8]
    """Those of its images that belong to the grid."""
    features_NF: Features | None
    """Features of those of its images that are compared; None if there are none."""


class Painter:
    """Samples images with fixed seeds and labels, the same at every evaluation.

    Image i has class i mod C, among the C classes of the data set.
    """

    def __init__(
        self, config: EvaluateConfig, dataset: LatentDataset, vae: str, timesteps: int, world: World
    ) -> None:
        """Load decoder, feature network and reference, and keep them.

        Raises WeightsError or ConfigError if one of them is missing or does not fit.
        """
        self._config = config
        self._count = max(config.grid_images, config.images)
        self._labels = balanced_labels(range(dataset.info.num_classes), self._count).tolist()
        self._settings = SamplingSettings(
            seed=config.seed,
            steps=str(config.sampling_steps),
            method=config.sampler,
            guidance=config.guidance,
            tile=config.tile,
        )
        self._schedule: Schedule = sampling_schedule(timesteps, self._settings, world.device)
        self._decoder: Vae = load_decoder(dataset, vae, world.device)
        self._comparison: Comparison | None = None
        if config.images:
            self._comparison = Comparison.load(config, dataset.info.image_size, world)

    def tiles(self, *, compare: bool) -> int:
        """Number of tiles: of all images, or without `compare` of those that the grid shows."""
        count = self._count if compare else self._config.grid_images
        return -(-count // self._config.tile)

    def paint(self, model: DiT, number: int, advance: Callable[[], None], *, compare: bool) -> Tile:
        """Sample and decode the images of a tile; `advance` is called after each denoising step.

        With `compare`, the features of images that count for the Frechet distance are taken, too.
        """
        first = number * self._config.tile
        images_NHW3 = sample_tile(
            model,
            self._decoder,
            self._schedule,
            labels=self._labels,
            images=range(first, min(first + self._config.tile, self._count)),
            settings=self._settings,
            advance=advance,
        )
        features_NF = None
        if compare and self._comparison is not None and first < self._config.images:
            features_NF = self._comparison.features(images_NHW3[: self._config.images - first])
        grid_NHW3 = images_NHW3[: max(0, self._config.grid_images - first)].cpu().numpy()
        return Tile(grid_NHW3, features_NF)

    def distance(self, tiles: list[Tile]) -> float | None:
        """Return the Frechet distance of all tiles to the reference; None if a feature is not finite."""
        assert self._comparison is not None
        parts = [tile.features_NF for tile in tiles if tile.features_NF is not None]
        return self._comparison.distance(np.concatenate(parts))

    @property
    def measure(self) -> str:
        """Describe the Frechet distance with everything that it depends on besides the weights."""
        assert self._comparison is not None
        config, network = self._config, self._comparison.network.identity
        reference_sha256 = self._comparison.reference_sha256
        return (
            f"Frechet distance, {config.images} images, {config.sampler}, {config.sampling_steps} steps, "
            f"guidance {config.guidance:g}, seed {config.seed}, {network.name} "
            f"{network.weights_sha256[:12]}, reference {reference_sha256[:12]}"
        )


def grid_of(tiles: list[Tile]) -> NDArray[np.uint8]:
    """Return the images of the grid, (N, H, W, 3)."""
    return np.concatenate([tile.grid_NHW3 for tile in tiles])


def _no_digest(images: ImageSet) -> str:
    """Refuse a file of images: their features would have to be computed at every start."""
    raise ConfigError(
        f"evaluate.reference={images.source} holds images; expected statistics, as `dit-scale evaluate "
        "--make-reference` writes"
    )


def _no_rows(images: ImageSet, sha256: str) -> FeatureRows:
    """Leave out the features of single images, which a Frechet distance does not need."""
    return FeatureRows(np.empty((0, 0), np.float32), None, None)
