"""Preview a latent data set: decode random samples with the VAE that made them.

Shapes: V views, C latent channels, h w latent sides, H W pixels.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from dit_scale import vae
from dit_scale.data.order import sample_ids
from dit_scale.data.shards import LatentDataset

Pixels = npt.NDArray[np.uint8]

GAP = 2
"""Width in pixels of the white gap to the right of each image; a grid adds its own gap between samples."""


def random_ids(num_samples: int, count: int, seed: int) -> list[int]:
    """Return up to `count` distinct sample ids: the first ones that a run with this seed would train on."""
    return sample_ids(np.arange(min(count, num_samples)), num_samples, seed).tolist()


def decode(dataset: LatentDataset, decoder: vae.Vae, sample_id: int) -> tuple[Pixels, int]:
    """Decode the posterior means of a sample's views => (V, H, W, 3) uint8 images, and its class."""
    moments_V2Chw, label = dataset.read(sample_id)
    mean_VChw = torch.from_numpy(moments_V2Chw.astype(np.float32)).chunk(2, dim=1)[0]
    return decoder.decode(mean_VChw * decoder.scale).cpu().numpy(), label


def side_by_side(images: Iterable[Pixels]) -> Pixels:
    """Concatenate (H, W, 3) images of equal height from left to right, each followed by a white gap."""
    return np.concatenate(
        [np.pad(image, ((0, 0), (0, GAP), (0, 0)), constant_values=255) for image in images], axis=1
    )
