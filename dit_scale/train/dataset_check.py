"""Checks that a latent data set fits the model that is trained on it."""

import hashlib

from dit_scale.config import TrainConfig
from dit_scale.data.shards import INFO_KEY, LatentDataset
from dit_scale.errors import ConfigError


def data_digest(dataset: LatentDataset) -> str:
    """SHA-256 of dataset.json, which contains the digest of every shard."""
    return hashlib.sha256(dataset.storage.read(INFO_KEY)).hexdigest()


def check_dataset(config: TrainConfig, dataset: LatentDataset) -> str:
    """Return a note when the model has more classes than the data, else "".

    Raises ConfigError when data set and model do not fit.
    """
    info = dataset.info
    if not info.samples:
        raise ConfigError(f"{config.data.url} holds no samples")
    if info.image_size != config.model.image_size:
        raise ConfigError(
            f"{config.data.url} holds latents of {info.image_size} px images, but "
            f"model.image_size is {config.model.image_size}"
        )
    if info.num_classes > config.model.num_classes:
        raise ConfigError(
            f"{config.data.url} has {info.num_classes} classes, but "
            f"model.num_classes is {config.model.num_classes}"
        )
    if info.num_classes == config.model.num_classes:
        return ""
    return (
        f"{config.data.url} has {info.num_classes} classes, model.num_classes is {config.model.num_classes}: "
        f"labels {info.num_classes} and above are never trained. This is fine if the data are a subset that "
        f"keeps the labels of the full set; otherwise set model.num_classes={info.num_classes}"
    )
