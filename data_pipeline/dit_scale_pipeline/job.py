"""Encode images into a latent data set, in parallel, by Ray.

    python data_pipeline/encode_latents.py --config configs/encode_imagenet_256.yaml [key=value ...]
    ray job submit --working-dir . -- python data_pipeline/encode_latents.py --config ... output=s3://...

Without RAY_ADDRESS a local Ray is started and ended with the job. Decoding tasks turn a shard's images
into crops, encoder actors turn crops into latents, a writing task puts the shard; how much is under way
at once is bounded. Start the same command again after any stop: finished shards are kept.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

# Found also where the package is not installed; as a script, Python looks beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console

from data_pipeline import output
from data_pipeline.encoder import Encoder
from data_pipeline.flow import Flow, Stall
from data_pipeline.inputs import Listing, open_input
from data_pipeline.inputs.saved import current_listing, load_listing, save_listing
from data_pipeline.metrics import Metrics
from data_pipeline.progress import Watch, listing_bar, report_listing, summary
from data_pipeline.ray_cluster import cluster, is_submitted, place, start_encoders, wait_for_nodes
from data_pipeline.shards_writer import ShardRecord
from dit_scale.config import EncodeConfig, dump, load
from dit_scale.data.shards import INFO_KEY, DatasetInfo, VaeIdentity, read_info
from dit_scale.errors import ConfigError, DitScaleError
from dit_scale.storage import Storage, open_storage
from dit_scale.vae_files import find as find_vae


@dataclass(frozen=True)
class Plan:
    """What the shards are functions of."""

    config: EncodeConfig
    listing: Listing
    vae: VaeIdentity
    identity: output.Identity
    shards: dict[str, range]
    """Name => its rows of the listing."""


def encode(config: EncodeConfig, console: Console) -> DatasetInfo:
    """The whole job; safe to call again after any stop."""
    config = resolve_paths(config)
    storage = open_storage(config.output)
    begun = output.read_identity(storage)
    complete = begun is not None and storage.exists(INFO_KEY)
    metrics = None if complete else Metrics(storage, config)
    saved = load_listing(storage)
    plan = make_plan(config, saved, console)
    if begun is not None:
        output.check_identity(storage, begun, plan.identity, plan.listing, saved)
    if metrics is None:
        console.print("this data set is complete, nothing to do")
        return read_info(storage)
    if saved is None or saved.sha256 != plan.listing.sha256:
        save_listing(storage, plan.listing)
    records = output.finished_shards(storage)
    num_missing = len(plan.shards) - len(records)
    with closing(metrics):
        if num_missing:
            console.print(f"{num_missing} of {len(plan.shards)} shards to encode; starting Ray and the VAE")
            with Watch(len(plan.listing), config, records.values(), console, metrics) as watch:
                with cluster(config.ray_address):
                    begun = make_shards(plan, storage, records, watch, console)
    assert begun is not None, "shards without an identity are refused above"
    return output.commit(
        storage, config, plan.listing, plan.vae, begun, [records[name] for name in plan.shards]
    )


def make_plan(config: EncodeConfig, saved: Listing | None, console: Console) -> Plan:
    """What is to be encoded, by what, into which shards; `saved` is the listing of an earlier start."""
    vae = find_vae(config.vae).identity
    output.latent_shape(config, vae)
    with listing_bar(console) as progress:
        listing = current_listing(open_input(config.source), saved, progress)
    report_listing(listing, console)
    output.refuse_empty(config, listing.empty_classes, f"{config.source}: classes without an image")
    identity = output.identity(config, listing, vae)
    return Plan(config, listing, vae, identity, output.plan(listing, config.shard_samples))


def make_shards(
    plan: Plan, storage: Storage, records: dict[str, ShardRecord], watch: Watch, console: Console
) -> output.Identity:
    """Make the shards that have no record, and add theirs; returns the identity of all of them."""
    config = plan.config
    placement = place(config, wait_for_nodes(config, console))
    encoders, runtime = start_encoders(config, plan.vae, placement, console)
    claimed = output.claim(storage, {**plan.identity, **runtime}, plan.listing)
    missing = {name: rows for name, rows in plan.shards.items() if name not in records}
    flow = Flow(
        config, plan.listing, missing, encoders, placement.decoders, runtime, plan.vae.latent_channels
    )
    watch.start()
    for event in flow.run():
        match event:
            case ShardRecord():
                records[event.name] = event
                watch.shard(event)
            case Stall():
                watch.stall(event.waits_for)
            case _:
                watch.batch(event)
    return claimed


def resolve_paths(config: EncodeConfig) -> EncodeConfig:
    """Paths as workers see them, who stand in other folders: absolute."""
    update = {}
    for name in ("source", "output", "vae"):
        text = getattr(config, name)
        path = Path(text).expanduser()
        if "://" in text or path.is_absolute() or (name == "vae" and (is_submitted() or not path.is_dir())):
            continue
        if is_submitted():
            raise ConfigError(
                f"{name}={text}: a submitted job runs in a temporary copy of the working directory; "
                "give an absolute path that all nodes see, or an s3:// url"
            )
        update[name] = str(path.absolute())
    return config.model_copy(update=update)


def dry_run(config: EncodeConfig, console: Console) -> None:
    """Print what would be done, and run one synthetic batch in this process, without Ray."""
    import torch

    print(dump(config))
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
    print(f"one batch on {runtime['device']}: {rate:.1f} images/s per encoder")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 done, 2 a mistake that the message names, 130 interrupted (Ctrl-C, SIGTERM)."""
    parser = argparse.ArgumentParser(
        description="Encode images into a latent data set.",
        epilog="Keys are those of EncodeConfig in dit_scale/config.py, for example: "
        "source=/data/imagenet/train output=s3://bucket/imagenet256 encoders=8. "
        "After any stop, start the same command again: finished shards are kept.",
    )
    parser.add_argument("--config", help="YAML file, for example configs/encode_imagenet_256.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, encode one synthetic batch")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    options = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        config = load(EncodeConfig, options.config, options.overrides)
        if options.dry_run:
            dry_run(config, console)
        else:
            print(summary(encode(config, console)))
    except DitScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
