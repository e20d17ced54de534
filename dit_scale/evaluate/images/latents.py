"""The images of a latent data set: posterior means, decoded by the autoencoder that made them.

Their Frechet distance to the original images is what the autoencoder costs; as a reference they leave it out.

Shapes: N images, C latent channels, h w latent sides, H W pixels.
"""

import hashlib

import numpy as np
import torch

from dit_scale.data.pixels import Pixels
from dit_scale.data.shards import LATENT_DTYPE, LatentDataset
from dit_scale.errors import DataError
from dit_scale.evaluate.images.base import TILE
from dit_scale.vae import load_decoder

IMAGE_VIEW = "image"


class LatentImages:
    """The decoded images of a latent data set, without its mirrored views."""

    def __init__(self, url: str, vae: str | None, device: torch.device) -> None:
        self.source = url
        self._dataset = LatentDataset.open(url)
        info = self._dataset.info
        if not len(self._dataset):
            raise DataError(f"{url} contains no samples")
        self._decoder = load_decoder(self._dataset, vae, device)
        self._view = info.views.index(IMAGE_VIEW)
        self.count, self.image_size = len(self._dataset), info.image_size
        self.preparation = f"posterior means decoded by the VAE {info.vae.weights_sha256[:12]}"

    def digest(self) -> str:
        """Return the SHA-256 of dataset.json, which names the digest of every shard and of the VAE."""
        text = self.preparation + self._dataset.info.model_dump_json()
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, images: range) -> Pixels:
        """Decode a range of at most a tile of images => (N, H, W, 3); passes have the shape of a tile."""
        assert 0 < len(images) <= TILE
        ids_B = np.minimum(np.arange(images.start, images.start + TILE), images.stop - 1)
        latents_B2Chw = np.empty((TILE, *self._dataset.info.latent_shape[1:]), LATENT_DTYPE)
        _, damaged = self._dataset.read_views(ids_B, np.full(TILE, self._view), latents_B2Chw)
        if damaged:
            raise DataError(next(iter(damaged.values())))
        mean_BChw = torch.from_numpy(latents_B2Chw.astype(np.float32)).chunk(2, dim=1)[0]
        return self._decoder.decode(mean_BChw * self._decoder.scale)[: len(images)].cpu().numpy()
