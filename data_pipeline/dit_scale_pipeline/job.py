"""The encoding job: encode images into a latent data set, in parallel on Ray.

Without RAY_ADDRESS, the job starts a local Ray and stops it at the end. Decoding tasks turn images into
crops, encoder actors turn crops into latents, and a writing task writes each shard. The work in flight is
bounded. After any interruption, run the same command again: finished shards are kept.
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
from dit_scale_pipeline.inputs.saved import current_listing, describe_changes, load_listing, save_listing
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
    """Everything that determines the shards."""

    config: EncodeConfig
    listing: Listing
    vae: VaeIdentity
    identity: output.Identity
    shards: dict[str, range]
    """Shard name => its rows of the listing."""


def encode(config: EncodeConfig, console: Console) -> DatasetInfo:
    """Run the whole job; safe to call again after any interruption."""
    refuse_relative(config)
    storage = open_storage(config.output)
    output.refuse_overlap(config, storage)
    stored = output.read_identity(storage)
    if stored is not None:
        config = output.with_precision_of(stored, config)
    saved = load_listing(storage)
    plan = make_plan(config, saved, console)
    if stored is not None:
        output.check_identity(storage, stored, plan.identity, plan.listing, saved)
    if stored is not None and storage.exists(INFO_KEY):
        console.print("the data set is complete, nothing to do")
        return read_info(storage, console.print)
    if stored is None:
        console.print("to check these facts without encoding, use --dry-run")
    # Opening the metrics writes to the output, so an output without write access fails before Ray starts.
    with closing(Metrics(storage, config, console.print)) as metrics:
        if saved is None or describe_changes(saved, plan.listing):
            save_listing(storage, plan.listing)
        records = output.finished_shards(storage)
        num_missing = len(plan.shards) - len(records)
        if num_missing:
            console.print(f"{num_missing} of {len(plan.shards)} shards to encode; starting Ray and the VAE")
            with JobProgress(len(plan.listing), config, records.values(), console, metrics) as progress:
                with cluster(config.ray_address):
                    stored = make_shards(plan, storage, records, progress, console)
    assert stored is not None, "read_identity refuses shards without an identity"
    in_order = [records[name] for name in plan.shards]
    return output.commit(storage, config, plan.listing, vae=plan.vae, stored=stored, records=in_order)


def make_plan(config: EncodeConfig, saved: Listing | None, console: Console) -> EncodePlan:
    """List the source and plan the shards; `saved` is the listing of an earlier attempt."""
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
    """Make the shards without a record and add their records; return the identity of the output."""
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
                progress.stalled(event.reason)
            case _:
                progress.batch_done(event)
    return claimed


def refuse_relative(config: EncodeConfig) -> None:
    """ConfigError for a relative source or output of a submitted job; its VAE may be relative."""
    for name, text in (("source", config.source), ("output", config.output)):
        if is_submitted() and "://" not in text and not Path(text).is_absolute():
            raise ConfigError(
                f"{name}={text}: a submitted job runs in a temporary copy of the working directory; "
                "give an absolute path that is visible on all nodes, or an s3:// URL"
            )


def dry_run(config: EncodeConfig, console: Console) -> None:
    """Print the plan and time one synthetic batch in this process, without Ray."""
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
    """Run the job or a dry run; return 0 when done, 130 when interrupted. Raises DitScaleError."""
    # Names may contain brackets and colons, which are not markup.
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        if dry:
            dry_run(config, console)
        else:
            print(summary(encode(config, console)))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0
