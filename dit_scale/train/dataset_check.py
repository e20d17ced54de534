"""Whether a latent data set fits the model that is to be trained on it."""

import hashlib

from dit_scale.config import TrainConfig
from dit_scale.data.shards import INFO_KEY, LatentDataset
from dit_scale.errors import ConfigError


def data_digest(dataset: LatentDataset) -> str:
    """SHA-256 of dataset.json: it names every shard by its own digest."""
    return hashlib.sha256(dataset.storage.read(INFO_KEY)).hexdigest()


def check_dataset(config: TrainConfig, dataset: LatentDataset) -> str:
    """A note on a model with more classes than the data, else nothing; ConfigError when they do not fit."""
    info = dataset.info
    if not info.samples:
        raise ConfigError(f"{config.data.url} holds no sample")
    if info.image_size != config.model.image_size:
        raise ConfigError(
            f"{config.data.url} holds latents of {info.image_size} px images, "
            f"model.image_size is {config.model.image_size}"
        )
    if info.num_classes > config.model.num_classes:
        raise ConfigError(
            f"{config.data.url} has {info.num_classes} classes, "
            f"model.num_classes is {config.model.num_classes}"
        )
    if info.num_classes == config.model.num_classes:
        return ""
    return (
        f"{config.data.url} has {info.num_classes} classes, model.num_classes is {config.model.num_classes}: "
        f"the labels from {info.num_classes} on are never trained. That is no error where the data are part "
        f"of a larger set whose labels they keep; else set model.num_classes={info.num_classes}"
    )
