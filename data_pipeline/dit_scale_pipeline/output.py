"""What an encoding job leaves in its output, so that any later start can go on where it stopped.

encode.json           the job's identity, put once and never replaced: another one is refused
listing.safetensors   what the keys are the places of
metrics.jsonl         how far each start was, when
shards/<name>.json    a finished shard
dataset.json          the commit mark of the whole: it is a function of the identity and the shards
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pydantic import ValidationError

from dit_scale.config import EncodeConfig
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
from dit_scale_pipeline.images import CROP
from dit_scale_pipeline.inputs import Listing
from dit_scale_pipeline.inputs.names import few
from dit_scale_pipeline.inputs.places import overlap
from dit_scale_pipeline.inputs.saved import difference
from dit_scale_pipeline.shards_writer import ShardRecord, shard_name, write_once

READS_AT_ONCE = 16
"""Records of finished shards that are read at once: on S3 each waits for the network."""

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
"""What dataset.json repeats of the identity: settings, then the runtime that the encoders report."""


def identity(config: EncodeConfig, listing: Listing, vae: VaeIdentity) -> Identity:
    """All that the bytes of the output depend on, as far as the driver knows it (the encoders add theirs)."""
    chosen = {} if config.precision == "auto" else {"precision": config.precision}
    return {
        "format_version": FORMAT_VERSION,
        "source_listing_sha256": listing.sha256,
        "image_size": config.image_size,
        "crop": CROP,
        "shard_samples": config.shard_samples,
        "vae_weights_sha256": vae.weights_sha256,
        "vae_scale": vae.scale,
        "vae_batch": config.vae_batch,
        **chosen,
        "channels_last": config.channels_last,
        "compile": config.compile,
        "threads": config.threads_per_encoder,
    }


def read_identity(storage: Storage) -> Identity | None:
    """What the output was begun with, None when it is free; ConfigError when it holds something else."""
    where = f"{storage.url}/{IDENTITY_KEY}"
    try:
        return unseal_any(storage.read(IDENTITY_KEY), where, DataError)[0]
    except MissingKeyError:
        if storage.exists(INFO_KEY) or storage.list("shards/"):
            raise ConfigError(f"{storage.url} holds another data set; choose an empty output") from None
        return None
    except DataError:
        raise DataError(f"{where} is damaged; choose an empty output") from None


def refuse_overlap(config: EncodeConfig, storage: Storage) -> None:
    """ConfigError when the output and the source lie in each other: one would be listed as images."""
    if how := overlap(config.source, storage):
        raise ConfigError(
            f"output={config.output} {how} ({config.source}); expected a place of its own. Choose another "
            "output"
        )


def with_precision_of(begun: Identity, config: EncodeConfig) -> EncodeConfig:
    """`precision: auto` goes on in the arithmetic that the output was begun with."""
    if config.precision != "auto":
        return config
    return config.model_copy(update={"precision": begun["precision"]})


def check_identity(
    storage: Storage, found: Identity, wanted: Identity, listing: Listing, saved: Listing | None
) -> None:
    """ConfigError names what differs; `saved` is the listing that the output was begun with."""
    differing = [key for key, value in wanted.items() if found.get(key) != value]
    # Labels count the empty classes too, of which the paths in the digest say nothing.
    if saved and saved.class_names != listing.class_names and "source_listing_sha256" not in differing:
        differing.append("class names")
        found = {**found, "class names": len(saved.class_names)}
        wanted = {**wanted, "class names": len(listing.class_names)}
    if not differing:
        return
    lines = [f"  {key}: {found.get(key)!r} there, {wanted[key]!r} here" for key in differing]
    if {"source_listing_sha256", "class names"} & set(differing):
        changes = difference(saved, listing) if saved else "its first listing was not saved"
        lines.append(
            f"The source holds other images than when this output was begun: {changes}. Make it what it was, "
            "or encode what is there now into another output"
        )
    if "vae_weights_sha256" in differing:
        lines.append("vae is another autoencoder than the one that made the shards that are there")
    raise ConfigError(
        f"{storage.url} was begun with another configuration; its shards stay as they are:\n"
        + "\n".join(lines)
        + "\nGo on with that configuration, or choose another output"
    )


def claim(storage: Storage, wanted: Identity, listing: Listing) -> Identity:
    """Begin the output with this identity, or find it begun with the same one."""
    if not storage.write_new(IDENTITY_KEY, sealed(wanted, indent=1)):
        check_identity(storage, read_identity(storage) or {}, wanted, listing, listing)
    return wanted


def finished_shards(storage: Storage) -> dict[str, ShardRecord]:
    """The shards whose record is there. DataError when a record, or a file that it promises, is damaged."""
    sizes = dict(storage.list("shards/"))
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        marks = pool.map(lambda key: _read_record(storage, key), [k for k in sizes if k.endswith(".json")])
        records = {record.name: record for record in marks}
    for record in records.values():
        for key, size in ((record.tar_key, record.bytes), (record.index_key, record.index_bytes)):
            if sizes.get(key) != size:
                raise DataError(
                    f"{storage.url}/{key}: expected {size} bytes as {record.record_key} says, got "
                    f"{sizes.get(key, 'no such file')}; it was damaged after it was made. "
                    f"Delete {record.record_key} and {key}, and start again: the shard is made again"
                )
    return records


def _read_record(storage: Storage, key: str) -> ShardRecord:
    try:
        tree, _ = unseal_any(storage.read(key), f"{storage.url}/{key}", DataError, RECORD_DIGEST)
        return ShardRecord.model_validate(tree)
    except (ValidationError, DataError):
        raise DataError(
            f"{storage.url}/{key} is damaged; delete it and start again: the shard is made again"
        ) from None


def plan_shards(listing: Listing, shard_samples: int) -> dict[str, range]:
    """Shard name => its slice of the listing."""
    count = len(listing)
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
    _check_classes(config, listing, records)
    samples = sum(record.samples for record in records)
    if not samples:
        raise DataError(f"{config.source}: not one of {len(listing)} images could be encoded")
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
    for key in storage.leftovers("shards/"):  # of writers that were killed; all shards are there without
        storage.delete(key)
    return info


def _check_classes(config: EncodeConfig, listing: Listing, records: Sequence[ShardRecord]) -> None:
    """DataError when every image of a class is quarantined: the class would silently be missing."""
    lost = np.array([item.key for record in records for item in record.quarantined], np.int64)
    left = np.bincount(np.delete(listing.labels, lost), minlength=len(listing.class_names))
    names = [name for name, count in zip(listing.class_names, left, strict=True) if not count]
    refuse_empty(config, names, "classes of which no image could be decoded")


def refuse_empty(config: EncodeConfig, names: Sequence[str], why: str) -> None:
    """DataError for classes without an image, unless they are allowed."""
    if names and not config.allow_empty_classes:
        raise DataError(
            f"{why}: {few(names)}. Bring its images, take the class away (either is another listing, for "
            "another output), or set allow_empty_classes=true: the class keeps its label"
        )
