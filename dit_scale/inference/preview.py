"""What the latents of a data set look like: samples chosen at random, decoded by the VAE that made them.

Shapes: V views, C latent channels, h w latent sides, H W image sides.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dit_scale import vae
from dit_scale.data.order import sample_ids
from dit_scale.data.shards import LatentDataset
from dit_scale.errors import WeightsError

Pixels = npt.NDArray[np.uint8]

GAP = 2
"""White pixels behind each picture of a sample; a grid of samples adds its own, which keeps them apart."""


def random_ids(num_samples: int, count: int, seed: int) -> list[int]:
    """Different sample ids, all of them where there are fewer than `count`: those a run would begin with."""
    return sample_ids(np.arange(min(count, num_samples)), num_samples, seed).tolist()


def load_decoder(dataset: LatentDataset, name_or_folder: str | None, device: torch.device) -> vae.Vae:
    """The VAE that made a data set, by default looked for under the name that dataset.json has.

    Raises WeightsError when it is not to be had, or its weights are others than those of the latents.
    """
    made_by = dataset.info.vae
    if name_or_folder is None and "/" not in made_by.name and not Path(made_by.name).is_dir():
        # Hub names have a "/"; of a folder dataset.json knows the last component alone.
        raise WeightsError(
            f"{dataset.storage.url} was made by a VAE in a folder {made_by.name!r} (weights sha256 "
            f"{made_by.weights_sha256[:12]}); pass that folder with --vae"
        )
    decoder = vae.load(name_or_folder or made_by.name, device)
    decoder.require_weights(made_by.weights_sha256)
    return decoder


def decode(dataset: LatentDataset, decoder: vae.Vae, sample_id: int) -> tuple[Pixels, int]:
    """The posterior means of a sample's views as images, uint8 (V, H, W, 3), and its class."""
    moments_V2Chw, label = dataset.read(sample_id)
    mean_VChw = torch.from_numpy(moments_V2Chw.astype(np.float32)).chunk(2, dim=1)[0]
    return decoder.decode(mean_VChw * decoder.scale).cpu().numpy(), label


def side_by_side(images: Iterable[Pixels]) -> Pixels:
    """Images (H, W, 3) of one height as one, from left to right, each with white behind it."""
    return np.concatenate(
        [np.pad(image, ((0, 0), (0, GAP), (0, 0)), constant_values=255) for image in images], axis=1
    )
