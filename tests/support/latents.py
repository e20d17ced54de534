"""Latent data sets of random numbers, in the real format, for tests and benchmarks that need no images."""

from pathlib import Path

import numpy as np

from dit_scale.data.shards import (
    FORMAT,
    FORMAT_VERSION,
    INFO_KEY,
    DatasetInfo,
    ShardInfo,
    SourceInfo,
    VaeIdentity,
)
from dit_scale.data.statistics import combine_sums
from dit_scale.errors import DataError
from dit_scale.sealed import sealed, unseal
from dit_scale.storage import open_storage
from dit_scale_pipeline.shards_writer import IndexRow, build_shard, shard_name


def write_latents(
    url: str | Path,
    num: int = 40,
    image_size: int = 32,
    num_classes: int = 10,
    shard_samples: int = 16,
    views: int = 2,
) -> None:
    """Write a finished data set of `num` random samples, a pure function of the arguments.

    Real data sets have two views; with one, records are half as long.
    """
    storage = open_storage(url)
    side = image_size // 8
    shape = (views, 8, side, side)
    shards, sums = [], []
    for start in range(0, num, shard_samples):
        rows = [_row(key, side, num_classes, views) for key in range(start, min(start + shard_samples, num))]
        shard = build_shard(shard_name(start // shard_samples), rows, [], latent_channels=4)
        shard.write(storage)
        shards.append(ShardInfo.model_validate(shard.record.model_dump()))
        sums.append(shard.record.sums)
    mean, std = combine_sums(sums, num, shape) if num else ((0.0,) * 4, (1.0,) * 4)
    info = DatasetInfo(
        format=FORMAT,
        version=FORMAT_VERSION,
        image_size=image_size,
        latent_shape=shape,
        latent_dtype="<f2",
        views=("image", "mirror")[:views],
        vae=VaeIdentity(name="random", weights_sha256="0" * 64, scale=0.5, downsample=8, latent_channels=4),
        crop="none",
        encoding={},
        source=SourceInfo(kind="random", uri="random", count=num, listing_sha256="0" * 64),
        class_names=tuple(str(label) for label in range(num_classes)),
        samples=num,
        channel_mean=mean,
        channel_std=std,
        shards=tuple(shards),
        quarantined=(),
    )
    storage.write(INFO_KEY, sealed(info.model_dump(mode="json")))


def edit_info(folder: Path, **changes: object) -> None:
    """Change keys of dataset.json on purpose, with a new digest."""
    tree = unseal((folder / INFO_KEY).read_bytes(), str(folder), DataError)
    (folder / INFO_KEY).write_bytes(sealed(tree | changes))


def _row(key: int, side: int, num_classes: int, views: int) -> IndexRow:
    draws = np.random.Generator(np.random.Philox(key=key))
    mean = draws.normal(size=(views, 4, side, side))
    std = draws.uniform(0.1, 0.5, size=(views, 4, side, side))
    return IndexRow(
        key, f"{key}.png", key % num_classes, np.concatenate((mean, std), axis=1).astype(np.float16)
    )
