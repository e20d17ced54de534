"""A run's folder: what it is, whether this configuration may go on with it, and from where.

<run>/config.yaml   the resolved configuration      <run>/metrics.jsonl   the record
<run>/events.jsonl  the journal                     <run>/attempts/       one file per start
<run>/checkpoints/  committed states                <run>/samples/        pictures
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_scale.config import TrainConfig, dump
from dit_scale.data.shards import INFO_KEY, LatentDataset
from dit_scale.dist import World
from dit_scale.errors import CheckpointError, ConfigError
from dit_scale.storage import open_storage
from dit_scale.train.checkpoint import Checkpoint, committed
from dit_scale.train.ema import ema_kind

Say = Callable[[str], None]


@dataclass
class RunState:
    """What survives a restart beside the tensors."""

    step: int = 0
    pending: tuple[tuple[float, ...], ...] = field(default=())


def checkpoints_of(run: str | Path) -> str:
    """Where a run keeps its checkpoints."""
    return f"{str(run).rstrip('/')}/checkpoints"


def identity(config: TrainConfig) -> dict[str, Any]:
    """The knobs that decide which numbers a run computes: they may not change within one run."""
    tree = config.model_dump(mode="json")
    model = {key: value for key, value in tree["model"].items() if key != "attention"}
    return {
        "seed": tree["seed"],
        "global_batch": tree["global_batch"],
        "model": model,
        "data.horizontal_flip": tree["data"]["horizontal_flip"],
        "diffusion": tree["diffusion"],
    }


def data_digest(dataset: LatentDataset) -> str:
    """SHA-256 of dataset.json: it names every shard by its own digest."""
    return hashlib.sha256(dataset.storage.read(INFO_KEY)).hexdigest()


def check_dataset(config: TrainConfig, dataset: LatentDataset) -> None:
    """Raises ConfigError when model and data do not fit."""
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


def begin_attempt(config: TrainConfig) -> int:
    """Claim the next attempt number and write the resolved configuration (rank 0 alone)."""
    folder = Path(config.run)
    storage = open_storage(folder)
    numbers = [int(Path(key).stem) for key, _ in storage.list("attempts/") if Path(key).stem.isdigit()]
    attempt = max(numbers, default=0) + 1
    if not storage.write_new(f"attempts/{attempt:04d}.json", json.dumps({"attempt": attempt}).encode()):
        raise ConfigError(f"{folder}: another process has just started attempt {attempt} of this run")
    storage.write("config.yaml", dump(config).encode())
    return attempt


def find_checkpoint(
    config: TrainConfig, data_sha256: str, world: World, fill: Callable[[Checkpoint], None], say: Say
) -> Checkpoint | None:
    """Fill in the newest checkpoint that all ranks can read; None when the run has none.

    A damaged one is named and passed over. Raises ConfigError when the run's folder belongs to another
    configuration or data set, CheckpointError when no checkpoint can be read.
    """
    storage = open_storage(checkpoints_of(config.run))
    names = world.first_says(lambda: committed(storage))
    for name in names:
        problem = ""
        try:
            checkpoint = Checkpoint(storage, name)
            _check_same_run(config, data_sha256, checkpoint)
            fill(checkpoint)
        except CheckpointError as error:
            problem = str(error)
        problems = [text for text in world.gather(problem) if text]
        if not problems:
            return checkpoint
        say(f"passing over checkpoint {name}: {problems[0]}")
    if names:
        raise CheckpointError(
            f"{config.run}: none of its {len(names)} checkpoints can be read; start a new run"
        )
    return None


def restored_kinds(config: TrainConfig, checkpoint: Checkpoint, say: Say) -> tuple[list[str], list[str]]:
    """EMA kinds to restore, and those that this checkpoint does not hold and that start anew."""
    held = checkpoint.kinds()
    wanted = [ema_kind(profile.name) for profile in config.ema]
    old, new = [kind for kind in wanted if kind in held], [kind for kind in wanted if kind not in held]
    if new:
        say(f"{', '.join(new)}: not in the checkpoint, starts from its weights")
    gone = sorted(kind for kind in held if kind.startswith("ema.") and kind not in wanted)
    if gone:
        say(f"{', '.join(gone)}: in the checkpoint and no longer configured, dropped")
    return old, new


def _check_same_run(config: TrainConfig, data_sha256: str, checkpoint: Checkpoint) -> None:
    before = identity(checkpoint.config)
    now = identity(config)
    changed = [f"{key} was {before[key]}, is {now[key]}" for key in now if before[key] != now[key]]
    if checkpoint.manifest.data_sha256 != data_sha256:
        changed.append("data.url holds another latent data set")
    if changed:
        raise ConfigError(
            f"{config.run} is a run of another configuration: {'; '.join(changed)}. "
            "Restore the values to resume it, or choose another run=FOLDER"
        )
