"""What an encoding job leaves in its output, so that any later start can go on where it stopped.

encode.json          the job's identity, put once and never replaced: another one is refused
shards/<name>.json   a finished shard
dataset.json         the commit mark of the whole: it is a function of the identity and the shards
"""

import json
from collections.abc import Sequence

from pydantic import ValidationError

from data_pipeline.encoder import VIEWS
from data_pipeline.images import CROP, Listing
from data_pipeline.shards_writer import ShardRecord, shard_name
from dit_scale.config import EncodeConfig
from dit_scale.data.shards import (
    FORMAT,
    FORMAT_VERSION,
    INFO_KEY,
    LATENT_DTYPE,
    DatasetInfo,
    Quarantined,
    ShardInfo,
    Source,
    VaeIdentity,
)
from dit_scale.data.statistics import combine_sums
from dit_scale.errors import ConfigError, DataError
from dit_scale.storage import Storage

IDENTITY_KEY = "encode.json"

Identity = dict[str, str | int | float]

ENCODING_KEYS = (
    "shard_samples",
    "vae_batch",
    "precision",
    "threads",
    "device",
    "torch",
    "diffusers",
    "pillow",
)
"""What dataset.json repeats of the identity: settings, then the runtime that the encoders report."""


def identity(config: EncodeConfig, listing: Listing, vae: VaeIdentity) -> Identity:
    """All that the bytes of the output depend on, as far as the driver knows it (the encoders add theirs)."""
    return {
        "format_version": FORMAT_VERSION,
        "source_listing_sha256": listing.sha256,
        "image_size": config.image_size,
        "crop": CROP,
        "shard_samples": config.shard_samples,
        "vae_weights_sha256": vae.weights_sha256,
        "vae_scale": vae.scale,
        "vae_batch": config.vae_batch,
        "precision": config.precision,
        "threads": config.threads_per_encoder,
    }


def check_identity(storage: Storage, wanted: Identity) -> Identity | None:
    """The identity the output was begun with, None when it is free; ConfigError names keys that differ."""
    if not storage.exists(IDENTITY_KEY):
        if storage.exists(INFO_KEY) or storage.list("shards/"):
            raise ConfigError(f"{storage.url} holds another data set; choose an empty output")
        return None
    try:
        found: Identity = json.loads(storage.read(IDENTITY_KEY))
    except ValueError as error:
        raise DataError(
            f"{storage.url}/{IDENTITY_KEY} is damaged ({error}); choose an empty output"
        ) from None
    differing = [
        f"  {key}: {found.get(key)!r} there, {value!r} here"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if differing:
        raise ConfigError(
            f"{storage.url} was begun with another configuration:\n"
            + "\n".join(differing)
            + "\nGo on with that one, or choose another output"
        )
    return found


def claim(storage: Storage, wanted: Identity) -> None:
    """Begin the output with this identity, or find it begun with the same one."""
    data = (json.dumps(wanted, indent=1) + "\n").encode()
    if not storage.write_new(IDENTITY_KEY, data):
        check_identity(storage, wanted)


def finished_shards(storage: Storage) -> dict[str, ShardRecord]:
    """The shards whose record is there and whose files have the sizes it says."""
    sizes = dict(storage.list("shards/"))
    records = {}
    for key in sizes:
        if key.endswith(".json"):
            try:
                record = ShardRecord.model_validate_json(storage.read(key))
            except ValidationError:
                continue  # a damaged mark is no mark: the shard is made again
            if sizes.get(record.tar_key) == record.bytes and record.index_key in sizes:
                records[record.name] = record
    return records


def plan(listing: Listing, shard_samples: int) -> dict[str, range]:
    """Shard name => its slice of the listing."""
    count = len(listing.entries)
    starts = range(0, count, shard_samples)
    return {
        shard_name(number): range(start, min(start + shard_samples, count))
        for number, start in enumerate(starts)
    }


def latent_shape(config: EncodeConfig, vae: VaeIdentity) -> tuple[int, int, int, int]:
    """(views, 2C, h, w); ConfigError when the VAE does not divide the image."""
    if config.image_size % vae.downsample:
        raise ConfigError(
            f"image_size {config.image_size}: expected a multiple of {vae.downsample}, as the VAE needs"
        )
    side = config.image_size // vae.downsample
    return len(VIEWS), 2 * vae.latent_channels, side, side


def commit(
    storage: Storage,
    config: EncodeConfig,
    listing: Listing,
    vae: VaeIdentity,
    claimed: Identity,
    records: Sequence[ShardRecord],
) -> DatasetInfo:
    """Put dataset.json; `claimed` is what the output was begun with, `records` are all shards, in order."""
    shape = latent_shape(config, vae)
    samples = sum(record.samples for record in records)
    if not samples:
        raise DataError(f"{config.source}: not one of {len(listing.entries)} files could be encoded")
    mean, std = combine_sums([record.sums for record in records], samples, shape)
    quarantined: list[Quarantined] = [item for record in records for item in record.quarantined]
    info = DatasetInfo(
        format=FORMAT,
        version=FORMAT_VERSION,
        image_size=config.image_size,
        latent_shape=shape,
        latent_dtype=LATENT_DTYPE.str,
        views=VIEWS,
        vae=vae,
        crop=CROP,
        encoding={key: claimed[key] for key in ENCODING_KEYS},
        source=Source(
            kind="class_folders",
            uri=config.source,
            count=len(listing.entries),
            listing_sha256=listing.sha256,
        ),
        class_names=listing.class_names,
        samples=samples,
        channel_mean=mean,
        channel_std=std,
        shards=tuple(ShardInfo.model_validate(record.model_dump()) for record in records),
        quarantined=tuple(quarantined),
    )
    storage.write(INFO_KEY, (json.dumps(info.model_dump(mode="json"), indent=1) + "\n").encode())
    return info
