"""The encoding job: images into a latent data set, in parallel, by Ray.

Without RAY_ADDRESS a local Ray is started and ended with the job. Decoding tasks turn a shard's images
into crops, encoder actors turn crops into latents, a writing task puts the shard; how much is under way
at once is bounded. Start the same command again after any stop: finished shards are kept.
"""

import math
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from dit_scale.config import EncodeConfig, dump
from dit_scale.data.shards import INFO_KEY, DatasetInfo, VaeIdentity, read_info
from dit_scale.errors import ConfigError
from dit_scale.storage import Storage, open_storage
from dit_scale.vae_files import find_vae
from dit_scale_pipeline import output
from dit_scale_pipeline.encoder import Encoder
from dit_scale_pipeline.flow import Flow, Stall
from dit_scale_pipeline.inputs import Listing, open_input
from dit_scale_pipeline.inputs.saved import current_listing, difference, load_listing, save_listing
from dit_scale_pipeline.metrics import Metrics
from dit_scale_pipeline.progress import JobProgress, listing_bar, report_listing, summary
from dit_scale_pipeline.ray_cluster import (
    cluster,
    is_submitted,
    place_encoders,
    start_encoders,
    wait_for_nodes,
)
from dit_scale_pipeline.shards_writer import ShardRecord


@dataclass(frozen=True)
class EncodePlan:
    """What the shards are functions of."""

    config: EncodeConfig
    listing: Listing
    vae: VaeIdentity
    identity: output.Identity
    shards: dict[str, range]
    """Name => its rows of the listing."""


def encode(config: EncodeConfig, console: Console) -> DatasetInfo:
    """The whole job; safe to call again after any stop."""
    refuse_relative(config)
    storage = open_storage(config.output)
    output.refuse_overlap(config, storage)
    begun = output.read_identity(storage)
    if begun is not None:
        config = output.with_precision_of(begun, config)
    saved = load_listing(storage)
    plan = make_plan(config, saved, console)
    if begun is not None:
        output.check_identity(storage, begun, plan.identity, plan.listing, saved)
    if begun is not None and storage.exists(INFO_KEY):
        console.print("this data set is complete, nothing to do")
        return read_info(storage, console.print)
    if begun is None:
        console.print("--dry-run prints this and encodes nothing")
    # An output that cannot be written to fails with the first row of its metrics, before Ray is started.
    with closing(Metrics(storage, config, console.print)) as metrics:
        if saved is None or difference(saved, plan.listing):
            save_listing(storage, plan.listing)
        records = output.finished_shards(storage)
        num_missing = len(plan.shards) - len(records)
        if num_missing:
            console.print(f"{num_missing} of {len(plan.shards)} shards to encode; starting Ray and the VAE")
            with JobProgress(len(plan.listing), config, records.values(), console, metrics) as progress:
                with cluster(config.ray_address):
                    begun = make_shards(plan, storage, records, progress, console)
    assert begun is not None, "shards without an identity are refused above"
    return output.commit(
        storage, config, plan.listing, plan.vae, begun, [records[name] for name in plan.shards]
    )


def make_plan(config: EncodeConfig, saved: Listing | None, console: Console) -> EncodePlan:
    """What is to be encoded, by what, into which shards; `saved` is the listing of an earlier start."""
    vae = find_vae(config.vae).identity
    output.latent_shape(config, vae)
    with listing_bar(console) as progress:
        images = open_input(config.source, columns=(config.image_column, config.label_column))
        listing = current_listing(images, saved, progress)
    report_listing(listing, console)
    output.refuse_empty(config, listing.empty_classes, f"{config.source}: classes without an image")
    identity = output.identity(config, listing, vae)
    return EncodePlan(config, listing, vae, identity, output.plan_shards(listing, config.shard_samples))


def make_shards(
    plan: EncodePlan,
    storage: Storage,
    records: dict[str, ShardRecord],
    progress: JobProgress,
    console: Console,
) -> output.Identity:
    """Make the shards that have no record, and add theirs; returns the identity of all of them."""
    config = plan.config
    placement = place_encoders(config, wait_for_nodes(config, console))
    encoders, runtime = start_encoders(config, plan.vae, placement, console)
    console.print(f"{len(encoders)} encoders on {runtime['device']}, the VAE in {runtime['precision']}")
    claimed = output.claim(storage, {**plan.identity, **runtime}, plan.listing)
    missing = {name: rows for name, rows in plan.shards.items() if name not in records}
    flow = Flow(
        config,
        plan.listing,
        shards=missing,
        encoders=encoders,
        num_decoders=placement.decoders,
        runtime=runtime,
        latent_channels=plan.vae.latent_channels,
    )
    progress.start()
    for event in flow.run():
        match event:
            case ShardRecord():
                records[event.name] = event
                progress.shard_done(event)
            case Stall():
                progress.stalled(event.waits_for)
            case _:
                progress.batch_done(event)
    return claimed


def refuse_relative(config: EncodeConfig) -> None:
    """ConfigError for a relative path in a submitted job; a VAE may be a folder of the working directory."""
    for name, text in (("source", config.source), ("output", config.output)):
        if is_submitted() and "://" not in text and not Path(text).is_absolute():
            raise ConfigError(
                f"{name}={text}: a submitted job runs in a temporary copy of the working directory; "
                "give an absolute path that all nodes see, or an s3:// url"
            )


def dry_run(config: EncodeConfig, console: Console) -> None:
    """Print what would be done, and run one synthetic batch in this process, without Ray."""
    import torch

    print(dump(config))
    output.refuse_overlap(config, open_storage(config.output))
    plan = make_plan(config, None, console)
    vae = plan.vae
    shape = output.latent_shape(config, vae)
    size_bytes = len(plan.listing) * 2 * math.prod(shape)
    print(
        f"VAE {vae.name} (weights {vae.weights_sha256[:12]}), scale {vae.scale}: latents {list(shape)}\n"
        f"{len(plan.shards)} shards, about {size_bytes / 1e9:.3f} GB"
    )
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder(config, vae, device)
    runtime = encoder.runtime()
    pixels = np.zeros((config.vae_batch, config.image_size, config.image_size, 3), np.uint8)
    encoder.encode(pixels, runtime)
    started = time.perf_counter()
    encoder.encode(pixels, runtime)
    rate = config.vae_batch / (time.perf_counter() - started)
    print(f"one batch on {runtime['device']} in {runtime['precision']}: {rate:.1f} images/s per encoder")


def run(config: EncodeConfig, dry: bool) -> int:
    """The job with its words for people; 0 done, 130 interrupted (Ctrl-C, SIGTERM). Raises DitScaleError."""
    # Names may hold brackets and colons, which are letters here.
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        if dry:
            dry_run(config, console)
        else:
            print(summary(encode(config, console)))
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        return 130
    return 0
