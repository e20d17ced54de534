"""Open images to evaluate: npz, folder, tar, sample folder, or latents that are decoded."""

from pathlib import Path

import torch

from dit_scale.errors import DataError
from dit_scale.evaluate.images.base import TILE, ImageSet
from dit_scale.evaluate.images.files import FolderImages, TarImages
from dit_scale.evaluate.images.npz import NpzImages
from dit_scale.sampling.sample_folder import NPZ, PROTOCOL

__all__ = ["TILE", "ImageSet", "open_images"]

LATENTS = "latents:"
_PICKLES = (".pkl", ".pickle")
_SUPPORTED = (
    "an npz file with arr_0, a folder or a tar of images, a sample folder, or a latent data set (latents:URL)"
)


def open_images(
    source: str, *, device: torch.device, crop: int | None = None, vae: str | None = None
) -> ImageSet:
    """Open the images at a path or URL.

    `crop` cuts image files to squares of this side as encoding does. `vae` is the autoencoder of a latent
    data set, by default the one that it names. Raises DataError for anything else, and WeightsError
    for another VAE.
    """
    path = Path(source)
    if source.startswith((LATENTS, "s3://")) or (path / "dataset.json").is_file():
        from dit_scale.evaluate.images.latents import LatentImages

        return _sized(LatentImages(source.removeprefix(LATENTS), vae, device), crop)
    if path.is_dir():
        if (path / NPZ).is_file():
            return _sized(NpzImages(path / NPZ), crop)
        if (path / PROTOCOL).is_file():
            raise DataError(f"{source}: its sampling has not finished; run the same command again")
        return FolderImages(path, crop)
    if not path.exists():
        raise DataError(f"{source} does not exist; expected {_SUPPORTED}")
    if path.suffix in _PICKLES:
        raise DataError(f"{source} is a pickle, which can run code when it is loaded; expected {_SUPPORTED}")
    if path.suffix == ".npz":
        return _sized(NpzImages(path), crop)
    if path.suffix == ".tar":
        return TarImages(path, crop)
    raise DataError(f"{source}: expected {_SUPPORTED}")


def _sized(images: ImageSet, crop: int | None) -> ImageSet:
    """Return images that have a size of their own. Raises DataError if another one is asked for."""
    if crop not in (None, images.image_size):
        raise DataError(
            f"{images.source} has images of {images.image_size} px, --crop asks for {crop}; only "
            "image files are cropped"
        )
    return images
