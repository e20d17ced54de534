"""Encode class folders of images into a latent data set, in parallel, by Ray.

    python data_pipeline/encode_latents.py --config configs/encode_imagenet_256.yaml [key=value ...]
    ray job submit --working-dir . -- python data_pipeline/encode_latents.py --config ... output=s3://...

Without RAY_ADDRESS a local Ray is started and ended with the job. Decoding tasks turn a shard's images
into crops, encoder actors turn crops into latents, a writing task puts the shard; how much is under way
at once is bounded. Start the same command again after any stop: finished shards are kept.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Found also where the package is not installed; as a script, Python looks beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console

from data_pipeline import output
from data_pipeline.encoder import Encoder
from data_pipeline.images import DecodedBatch, Entry, Listing, list_images, read_batch
from data_pipeline.progress import Watch, report_listing, summary
from data_pipeline.shards_writer import ShardRecord, write_shard
from dit_scale.config import EncodeConfig, dump, load
from dit_scale.data.shards import INFO_KEY, DatasetInfo, read_info
from dit_scale.errors import ConfigError, DeviceError, DitScaleError
from dit_scale.storage import open_storage
from dit_scale.vae_files import find as find_vae

ROOT = Path(__file__).resolve().parents[1]

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

BATCHES_PER_ENCODER = 2
"""VAE batches given to an encoder at once: one in work, one waiting."""
SHARDS_WRITING = 2
"""Shards being written at once; while there are so many, no further batch is begun."""
PATIENCE_S = 20.0
"""Time after which a job that waits for its encoders says so."""


@dataclass
class ShardUnderWay:
    """What is known of a shard whose batches are being encoded, by number of the batch."""

    name: str
    num_batches: int
    accounts: dict[int, DecodedBatch] = field(default_factory=dict)
    moments: dict[int, "ObjectRef"] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """One VAE batch on its way: it never holds images of two shards."""

    shard: ShardUnderWay
    number: int
    entries: tuple[Entry, ...]


class Flow:
    """The batches of all shards, through decoding tasks, encoder actors and writing tasks."""

    def __init__(
        self,
        config: EncodeConfig,
        listing: Listing,
        shards: dict[str, range],
        encoders: "list[ActorHandle]",
        latent_channels: int,
    ) -> None:
        import ray

        self._config, self._encoders, self._latent_channels = config, encoders, latent_channels
        self._decode: Any = ray.remote(num_cpus=config.cpus_per_decoder, num_returns=2)(read_batch)
        self._write: Any = ray.remote(num_cpus=config.cpus_per_decoder)(write_shard)
        self._pending = deque(_batches(listing, shards, config.vae_batch))
        self._decoding: dict[ObjectRef, tuple[Batch, ObjectRef]] = {}
        self._decoded: deque[tuple[Batch, ObjectRef]] = deque()
        self._encoding: dict[ObjectRef, tuple[Batch, int]] = {}
        self._writing: dict[ObjectRef, ShardUnderWay] = {}

    def run(self) -> Iterator[DecodedBatch | ShardRecord]:
        """Do it all; yields the account of each batch that is through and the record of each shard."""
        import ray

        while True:
            self._start_decoding()
            self._start_encoding()
            under_way = [*self._decoding, *self._encoding, *self._writing]
            if not under_way:
                return
            (done,), _ = ray.wait(under_way, num_returns=1)
            if done in self._decoding:
                batch, pixels = self._decoding.pop(done)
                batch.shard.accounts[batch.number] = _result(done)
                self._decoded.append((batch, pixels))
            elif done in self._encoding:
                batch, _ = self._encoding.pop(done)
                _result(done)
                yield self._finish(batch, done)
            else:
                self._writing.pop(done)
                yield _result(done)

    def _start_decoding(self) -> None:
        while (
            self._pending
            and len(self._decoding) < self._config.decoders
            and len(self._decoded) < BATCHES_PER_ENCODER * len(self._encoders)
            and len(self._writing) < SHARDS_WRITING
        ):
            batch = self._pending.popleft()
            pixels, account = self._decode.remote(self._config.source, batch.entries, self._config.image_size)
            self._decoding[account] = (batch, pixels)

    def _start_encoding(self) -> None:
        queued = [0] * len(self._encoders)
        for _, number in self._encoding.values():
            queued[number] += 1
        while self._decoded and min(queued) < BATCHES_PER_ENCODER:
            batch, pixels = self._decoded.popleft()
            number = queued.index(min(queued))
            queued[number] += 1
            self._encoding[self._encoders[number].encode.remote(pixels)] = (batch, number)

    def _finish(self, batch: Batch, moments: "ObjectRef") -> DecodedBatch:
        """Note a batch's latents; the last one of a shard sends it off to be written."""
        shard = batch.shard
        shard.moments[batch.number] = moments
        if len(shard.moments) == shard.num_batches:
            numbers = range(shard.num_batches)
            task = self._write.remote(
                self._config.output,
                shard.name,
                [shard.accounts[number] for number in numbers],
                self._latent_channels,
                *(shard.moments[number] for number in numbers),
            )
            self._writing[task] = shard
        return shard.accounts[batch.number]


def _batches(listing: Listing, shards: dict[str, range], size: int) -> Iterator[Batch]:
    for name, slice_ in shards.items():
        starts = range(slice_.start, slice_.stop, size)
        shard = ShardUnderWay(name, len(starts))
        for number, start in enumerate(starts):
            yield Batch(shard, number, listing.entries[start : min(start + size, slice_.stop)])


def _result(reference: "ObjectRef") -> Any:
    """ray.get, with a person's mistake in a worker raised as it was there."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DitScaleError):
            raise error.cause from None
        raise


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """Join a Ray cluster or start a local one; what was started here is ended here."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns at every start
    address = os.environ.get("RAY_ADDRESS", "local") if address == "auto" else address
    how: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        how["include_dashboard"] = False
    elif not _is_submitted():
        how["runtime_env"] = {"py_modules": [str(ROOT / "dit_scale"), str(ROOT / "data_pipeline")]}
    try:
        try:
            ray.init(**how)
        except (ConnectionError, ValueError) as error:
            raise DeviceError(f"no Ray cluster at {address}: {error}") from None
        # A scheduler's SIGTERM is an interrupt too; Ray's own handler prints a stack and leaves with 15.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    finally:
        ray.shutdown()


def _is_submitted() -> bool:
    """Whether this is the driver of `ray job submit`, which has shipped the working directory already."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def resolve_paths(config: EncodeConfig) -> EncodeConfig:
    """Paths as workers see them, who stand in other folders: absolute."""
    update = {}
    for name in ("source", "output", "vae"):
        text = getattr(config, name)
        path = Path(text).expanduser()
        if "://" in text or path.is_absolute() or (name == "vae" and (_is_submitted() or not path.is_dir())):
            continue
        if _is_submitted():
            raise ConfigError(
                f"{name}={text}: a submitted job runs in a temporary copy of the working directory; "
                "give an absolute path that all nodes see, or an s3:// url"
            )
        update[name] = str(path.absolute())
    return config.model_copy(update=update)


def choose_device(config: EncodeConfig, nodes: Sequence[dict[str, float]]) -> str:
    """cpu or cuda for these nodes' resources; DeviceError when Ray would wait for them forever."""
    gpus = sum(node.get("GPU", 0) for node in nodes)
    device = config.device if config.device != "auto" else ("cuda" if gpus else "cpu")
    wants = {"CPU": config.cpus_per_encoder, "GPU": config.gpus_per_encoder if device == "cuda" else 0}
    wants = {kind: amount for kind, amount in wants.items() if amount}
    places = sum(int(min(node.get(kind, 0) / amount for kind, amount in wants.items())) for node in nodes)
    cpus = sum(node.get("CPU", 0) for node in nodes)
    if places < config.encoders:
        raise DeviceError(
            f"{config.encoders} encoders that reserve {wants} each do not fit on the Ray cluster "
            f"({cpus:g} CPUs, {gpus:g} GPUs, room for {places}); "
            "lower encoders or cpus_per_encoder, or add nodes"
        )
    left = cpus - config.encoders * config.cpus_per_encoder
    if left < config.cpus_per_decoder:
        raise DeviceError(
            f"{config.encoders} encoders leave {left:g} of {cpus:g} CPUs, a decoder reserves "
            f"{config.cpus_per_decoder:g}; lower encoders, cpus_per_encoder or cpus_per_decoder, or add nodes"
        )
    return device


def start_encoders(config: EncodeConfig, console: Console) -> "tuple[list[ActorHandle], dict[str, str]]":
    """The encoder actors with their VAE loaded, and the runtime that they share."""
    import ray

    device = choose_device(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    actor: Any = ray.remote(Encoder).options(
        num_cpus=config.cpus_per_encoder,
        num_gpus=config.gpus_per_encoder if device == "cuda" else 0,
        max_restarts=-1,
        max_task_retries=-1,
    )
    encoders = [actor.remote(config, device) for _ in range(config.encoders)]
    runtimes = [encoder.runtime.remote() for encoder in encoders]
    _, waiting = ray.wait(runtimes, num_returns=len(runtimes), timeout=PATIENCE_S)
    if waiting:
        console.print(f"waiting for {len(waiting)} encoders: the cluster is busy or the VAE loads slowly")
    found = [_result(runtime) for runtime in runtimes]
    if any(runtime != found[0] for runtime in found):
        different = {str(runtime) for runtime in found}
        raise DeviceError(
            "the encoders run on different devices or libraries, a data set must come from one kind:\n  "
            + "\n  ".join(sorted(different))
        )
    return encoders, found[0]


def encode(config: EncodeConfig, console: Console) -> DatasetInfo:
    """The whole job; safe to call again after any stop."""
    listing = list_images(config.source)
    report_listing(listing, console)
    resolved = resolve_paths(config)
    storage = open_storage(resolved.output)
    vae = find_vae(resolved.vae).identity
    output.latent_shape(config, vae)
    identity = output.identity(config, listing, vae)
    claimed = output.check_identity(storage, identity)
    if claimed and storage.exists(INFO_KEY):
        console.print("this data set is complete, nothing to do")
        return read_info(storage)
    shards = output.plan(listing, config.shard_samples)
    records = output.finished_shards(storage)
    todo = {name: slice_ for name, slice_ in shards.items() if name not in records}
    if todo:
        console.print(f"{len(todo)} of {len(shards)} shards to encode; starting Ray and the VAE")
        with cluster(config.ray_address):
            encoders, runtime = start_encoders(resolved, console)
            claimed = {**identity, **runtime}
            output.claim(storage, claimed)
            flow = Flow(resolved, listing, todo, encoders, vae.latent_channels)
            with Watch(
                len(listing.entries), config.max_quarantined, list(records.values()), console
            ) as watch:
                for event in flow.run():
                    if isinstance(event, ShardRecord):
                        records[event.name] = event
                        watch.shard(event)
                    else:
                        watch.batch(event)
    assert claimed is not None, "shards without an identity are refused above"
    return output.commit(storage, config, listing, vae, claimed, [records[name] for name in shards])


def dry_run(config: EncodeConfig, console: Console) -> None:
    """Print what would be done, and run one synthetic batch in this process, without Ray."""
    import torch

    print(dump(config))
    listing = list_images(config.source)
    report_listing(listing, console)
    vae = find_vae(config.vae).identity
    shape = output.latent_shape(config, vae)
    size_bytes = len(listing.entries) * 2 * math.prod(shape)
    print(
        f"VAE {vae.name} (weights {vae.weights_sha256[:12]}), scale {vae.scale}: latents {list(shape)}\n"
        f"{len(output.plan(listing, config.shard_samples))} shards, about {size_bytes / 1e9:.3f} GB"
    )
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder(config, device)
    pixels = np.zeros((config.vae_batch, config.image_size, config.image_size, 3), np.uint8)
    encoder.encode(pixels)
    started = time.perf_counter()
    encoder.encode(pixels)
    rate = config.vae_batch / (time.perf_counter() - started)
    print(f"one batch on {encoder.runtime()['device']}: {rate:.1f} images/s per encoder")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 done, 2 a mistake that the message names, 130 interrupted (Ctrl-C, SIGTERM)."""
    parser = argparse.ArgumentParser(
        description="Encode class folders of images into a latent data set.",
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
