"""The output of an encoding job, from which any later attempt continues.

encode.json           identity of the job, written once; a job with another identity is refused
listing.safetensors   the listing: a sample's key is its index
metrics.jsonl         progress of all attempts
shards/<name>.json    record of a finished shard
dataset.json          commit mark of the data set, determined by the identity and the shards
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pydantic import ValidationError

from dit_scale.config import EncodeConfig
from dit_scale.data.pixels import CROP
from dit_scale.data.shards import (
    FORMAT,
    FORMAT_VERSION,
    IDENTITY_KEY,
    INFO_KEY,
    LATENT_DTYPE,
    RECORD_DIGEST,
    DatasetInfo,
    Quarantined,
    ShardInfo,
    SourceInfo,
    VaeIdentity,
)
from dit_scale.data.statistics import combine_sums
from dit_scale.errors import ConfigError, DataError
from dit_scale.sealed import sealed, unseal_any
from dit_scale.storage import MissingKeyError, Storage
from dit_scale_pipeline.encoder import VIEWS
from dit_scale_pipeline.inputs import Listing
from dit_scale_pipeline.inputs.names import few
from dit_scale_pipeline.inputs.places import overlap
from dit_scale_pipeline.inputs.saved import describe_changes
from dit_scale_pipeline.shards_writer import ShardRecord, shard_name, write_once

READ_THREADS = 16
"""Shard records read in parallel, because each read on S3 waits for the network."""

Identity = dict[str, str | int | float]

ENCODING_KEYS = (
    "shard_samples",
    "vae_batch",
    "precision",
    "channels_last",
    "compile",
    "threads",
    "device",
    "torch",
    "diffusers",
    "pillow",
)
"""Keys of the identity that dataset.json repeats: settings, then the runtime reported by the encoders."""


def identity(config: EncodeConfig, listing: Listing, vae: VaeIdentity) -> Identity:
    """Return what the bytes of the output depend on, except for the runtime that the encoders report."""
    precision = {} if config.precision == "auto" else {"precision": config.precision}
    return {
        "format_version": FORMAT_VERSION,
        "source_listing_sha256": listing.sha256,
        "image_size": config.image_size,
        "crop": CROP,
        "shard_samples": config.shard_samples,
        "vae_weights_sha256": vae.weights_sha256,
        "vae_scale": vae.scale,
        "vae_batch": config.vae_batch,
        **precision,
        "channels_last": config.channels_last,
        "compile": config.compile,
        "threads": config.threads_per_encoder,
    }


def read_identity(storage: Storage) -> Identity | None:
    """Return the identity that the output was created with, or None; ConfigError for a foreign data set."""
    where = f"{storage.url}/{IDENTITY_KEY}"
    try:
        return unseal_any(storage.read(IDENTITY_KEY), where, DataError)[0]
    except MissingKeyError:
        if storage.exists(INFO_KEY) or storage.list("shards/"):
            raise ConfigError(f"{storage.url} contains another data set; choose an empty output") from None
        return None
    except DataError:
        raise DataError(f"{where} is damaged; choose an empty output") from None


def refuse_overlap(config: EncodeConfig, storage: Storage) -> None:
    """ConfigError when output and source overlap: the output would be listed as images."""
    if how := overlap(config.source, storage):
        raise ConfigError(
            f"output={config.output} {how} ({config.source}); choose an output outside the source"
        )


def with_precision_of(stored: Identity, config: EncodeConfig) -> EncodeConfig:
    """Replace `precision: auto` by the precision that the output was created with."""
    if config.precision != "auto":
        return config
    return config.model_copy(update={"precision": stored["precision"]})


def check_identity(
    storage: Storage, stored: Identity, wanted: Identity, listing: Listing, saved: Listing | None
) -> None:
    """ConfigError with all differences; `saved` is the listing that the output was created with."""
    differing = [key for key, value in wanted.items() if stored.get(key) != value]
    # Empty classes have labels too, but no paths in the digest.
    if saved and saved.class_names != listing.class_names and "source_listing_sha256" not in differing:
        differing.append("class names")
        stored = {**stored, "class names": len(saved.class_names)}
        wanted = {**wanted, "class names": len(listing.class_names)}
    if not differing:
        return
    lines = [f"  {key}: {stored.get(key)!r} in the output, {wanted[key]!r} now" for key in differing]
    if {"source_listing_sha256", "class names"} & set(differing):
        changes = describe_changes(saved, listing) if saved else "its listing was not saved"
        lines.append(
            f"The source has changed since this output was created: {changes}. Restore it, or encode the new "
            "source into another output"
        )
    if "vae_weights_sha256" in differing:
        lines.append("vae is not the autoencoder that encoded the existing shards")
    raise ConfigError(
        f"{storage.url} was created with another configuration; its shards are unchanged:\n"
        + "\n".join(lines)
        + "\nContinue with that configuration, or choose another output"
    )


def claim(storage: Storage, wanted: Identity, listing: Listing) -> Identity:
    """Write the identity of the output, or check that it already has the same one."""
    if not storage.write_new(IDENTITY_KEY, sealed(wanted, indent=1)):
        check_identity(storage, read_identity(storage) or {}, wanted, listing, listing)
    return wanted


def finished_shards(storage: Storage) -> dict[str, ShardRecord]:
    """Return the records of finished shards; DataError when a record or one of its files is damaged."""
    sizes = dict(storage.list("shards/"))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        found = pool.map(lambda key: _read_record(storage, key), [k for k in sizes if k.endswith(".json")])
        records = {record.name: record for record in found}
    for record in records.values():
        for key, size in ((record.tar_key, record.bytes), (record.index_key, record.index_bytes)):
            if sizes.get(key) != size:
                raise DataError(
                    f"{storage.url}/{key}: expected {size} bytes according to {record.record_key}, got "
                    f"{sizes.get(key, 'no such file')}; it was damaged after it was written. "
                    f"Delete {record.record_key} and {key}, then start again to encode the shard again"
                )
    return records


def _read_record(storage: Storage, key: str) -> ShardRecord:
    try:
        tree, _ = unseal_any(storage.read(key), f"{storage.url}/{key}", DataError, RECORD_DIGEST)
        return ShardRecord.model_validate(tree)
    except (ValidationError, DataError):
        raise DataError(
            f"{storage.url}/{key} is damaged; delete it, then start again to encode the shard again"
        ) from None


def plan_shards(listing: Listing, shard_samples: int) -> dict[str, range]:
    """Return shard name => its slice of the listing."""
    count = len(listing)
    starts = range(0, count, shard_samples)
    return {
        shard_name(number): range(start, min(start + shard_samples, count))
        for number, start in enumerate(starts)
    }


def latent_shape(config: EncodeConfig, vae: VaeIdentity) -> tuple[int, int, int, int]:
    """Return (views, 2C, h, w); ConfigError when the VAE cannot divide the image size."""
    if config.image_size % vae.downsample:
        raise ConfigError(
            f"image_size {config.image_size}: expected a multiple of {vae.downsample} for this VAE"
        )
    side = config.image_size // vae.downsample
    return len(VIEWS), 2 * vae.latent_channels, side, side


def commit(
    storage: Storage,
    config: EncodeConfig,
    listing: Listing,
    *,
    vae: VaeIdentity,
    stored: Identity,
    records: Sequence[ShardRecord],
) -> DatasetInfo:
    """Write dataset.json from the identity of the output and the records of all shards, in order."""
    shape = latent_shape(config, vae)
    _check_classes(config, listing, records)
    samples = sum(record.samples for record in records)
    if not samples:
        raise DataError(f"{config.source}: none of {len(listing)} images could be encoded")
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
        encoding={key: stored[key] for key in ENCODING_KEYS},
        source=SourceInfo(
            kind=listing.kind,
            uri=config.source,
            count=len(listing),
            listing_sha256=listing.sha256,
        ),
        class_names=listing.class_names,
        samples=samples,
        channel_mean=mean,
        channel_std=std,
        shards=tuple(ShardInfo.model_validate(record.model_dump()) for record in records),
        quarantined=tuple(quarantined),
    )
    write_once(storage, INFO_KEY, sealed(info.model_dump(mode="json"), indent=1))
    for key in storage.leftovers("shards/"):  # left by killed writers; all shards are complete
        storage.delete(key)
    return info


def _check_classes(config: EncodeConfig, listing: Listing, records: Sequence[ShardRecord]) -> None:
    """DataError when all images of a class are quarantined: the class would silently be missing."""
    lost = np.array([item.key for record in records for item in record.quarantined], np.int64)
    left = np.bincount(np.delete(listing.labels, lost), minlength=len(listing.class_names))
    names = [name for name, count in zip(listing.class_names, left, strict=True) if not count]
    refuse_empty(config, names, "classes whose images are all quarantined")


def refuse_empty(config: EncodeConfig, names: Sequence[str], why: str) -> None:
    """DataError for classes without an image, unless they are allowed."""
    if names and not config.allow_empty_classes:
        raise DataError(
            f"{why}: {few(names)}. Add images or remove the class and choose another output, or set "
            "allow_empty_classes=true: the class then keeps its label"
        )
