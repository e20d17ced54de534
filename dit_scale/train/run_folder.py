"""A run's folder: what it is, whether this configuration may go on with it, and from where.

<run>/config.yaml   the resolved configuration      <run>/metrics.jsonl   the record
<run>/events.jsonl  the journal                     <run>/samples/        pictures
<run>/records/      the first two as each attempt has them, see dit_scale.telemetry.record

and below the root of its state, which is the same folder unless checkpoint.url names another:

<root>/attempts/    one file per start              <root>/checkpoints/   committed states
<root>/ema/         stored averages, for `dit-scale ema reconstruct`

Where checkpoint.url names another root, the folder may be one machine's own. So each checkpoint takes the
record and the journal along, and the machine on which the run goes on has them from there.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from dit_scale import dist
from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.attempts import Ranges
from dit_scale.checkpoint.manifest import Manifest, read_manifest, step_and_attempt
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig, load, relocated
from dit_scale.data.shards import INFO_KEY, LatentDataset
from dit_scale.dist import World
from dit_scale.errors import CheckpointError, ConfigError
from dit_scale.storage import Storage, UnavailableError, open_storage
from dit_scale.train.averages import since_steps
from dit_scale.train.changes import Say, check_same_run, say_changes

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


@dataclass
class RunState:
    """What survives a restart beside the tensors."""

    step: int = 0
    """Steps taken, the skipped ones among them."""
    pending: tuple[tuple[float, ...], ...] = ()
    """Rows of the steps since the last log point."""
    guard: dict[str, float] | None = None
    """None before the first step."""
    skipped: tuple[int, ...] = ()
    """Steps, counted from 1, whose update was left out."""
    excluded: Ranges = ()
    """Ranges of positions that the run leaves out."""
    quarantined: dict[int, str] = field(default_factory=dict)
    """Sample id => why it cannot be read."""
    ema_since: dict[str, int] = field(default_factory=dict)
    """Profile => step since which its average is tracked, as far as it is known."""

    @classmethod
    def of(cls, manifest: Manifest, excluded: Ranges) -> "RunState":
        """As a checkpoint has it; `excluded` are the ranges left out since."""
        return cls(
            manifest.step,
            manifest.pending_metrics,
            manifest.guard,
            manifest.skipped_steps,
            merged((*manifest.excluded_positions, *excluded)),
            dict(manifest.quarantined),
        )


def state_of(config: TrainConfig, found: Checkpoint | None, excluded: Ranges) -> RunState:
    """The state of a run that resumes from this checkpoint, or begins."""
    state = RunState.of(found.manifest, excluded) if found else RunState(excluded=excluded)
    return replace(state, ema_since=since_steps(config.ema, found))


def merged(ranges: Ranges) -> Ranges:
    """The same positions as sorted, disjoint, half-open ranges."""
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1]:
            out[-1] = (out[-1][0], max(high, out[-1][1]))
        else:
            out.append((low, high))
    return tuple(out)


def root_of(config: TrainConfig) -> Storage:
    """Where the run keeps its attempts and checkpoints."""
    return open_storage(config.checkpoint.url or config.run)


def config_of_folder(run: str | Path) -> TrainConfig:
    """The configuration in a run's folder, which may have moved. Raises ConfigError for any other folder."""
    if not (Path(run) / "config.yaml").is_file():
        raise ConfigError(f"{run}: expected a run's folder, with its config.yaml")
    return relocated(load(TrainConfig, Path(run) / "config.yaml"), str(run))


def root_of_folder(run: str | Path) -> Storage:
    """Where the run of this folder keeps its attempts and checkpoints."""
    return root_of(config_of_folder(run))


def choose_precision(config: TrainConfig, world: World) -> tuple[TrainConfig, str]:
    """The configuration with `engine.precision: auto` decided, the same on all ranks, and why, in one line.

    A run keeps the precision of its newest checkpoint; a new one takes what suits the device of rank 0.
    """
    asked = config.engine.precision
    fast_bf16 = dist.multiplies_bf16(world.device)
    if asked != "auto":
        is_slow = asked == "bf16" and not fast_bf16
        return config, f"precision bf16: {dist.SLOW_BF16}" if is_slow else ""

    def choose() -> tuple[str, str]:
        root = root_of(config)
        for path in attempts.committed(root):
            with suppress(CheckpointError):  # named when it is filled in
                return read_manifest(root, path).config["engine"]["precision"], "as the run began"
        has = "multiplies bf16 in hardware" if fast_bf16 else "has no bf16 instructions"
        return dist.choose_precision("auto", world.device), f"this {world.device.type.upper()} {has}"

    chosen, why = world.broadcast(choose)
    engine = config.engine.model_copy(update={"precision": chosen})
    return config.model_copy(update={"engine": engine}), f"precision auto: {chosen}, {why}"


def record_of(config: TrainConfig) -> tuple[Path, ...]:
    """What a checkpoint takes along of the run's folder; nothing where it lies in that folder itself."""
    return tuple(Path(config.run) / name for name in (METRICS, EVENTS)) if config.checkpoint.url else ()


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


def find_checkpoint(
    config: TrainConfig,
    data_sha256: str,
    world: World,
    fill: Callable[[Checkpoint], None],
    say: Say,
    at_most_step: int | None = None,
) -> Checkpoint | None:
    """Fill in the newest checkpoint that all ranks can read; None when the run has none.

    A damaged one is named and passed over, and so is one beyond `at_most_step`. Raises ConfigError when
    the run belongs to another configuration or data set, or the ranks see different ones; CheckpointError
    when all are damaged or when the ranks find different ones under one name; and UnavailableError when the
    storage does not answer: nothing is passed over for that.
    """
    if len(set(world.gather(data_sha256))) > 1:
        raise ConfigError(
            f"data.url={config.data.url} is not the same latent data set for all ranks; on every node it "
            "must lead to the same one, or to an exact copy"
        )
    root = root_of(config)
    paths, lost = world.broadcast(lambda: (attempts.committed(root), attempts.unrecorded(root)))
    for number in lost:
        say(f"attempts/{number:04d}.json is missing; attempt {number} counts as far as it can be read")
    if at_most_step is not None:
        paths = [path for path in paths if step_and_attempt(path)[0] <= at_most_step]
    for path in paths:
        problem, digest, unavailable = "", "", False
        try:
            checkpoint = Checkpoint(root, path)
            digest = hashlib.sha256(checkpoint.manifest.model_dump_json().encode()).hexdigest()
            check_same_run(config, data_sha256, checkpoint)
            fill(checkpoint)
        except CheckpointError as error:
            problem = str(error)
        except UnavailableError as error:
            problem, unavailable = str(error), True
        answers = world.gather((problem, digest, unavailable))
        if gone := [text for text, _, unavailable in answers if unavailable]:
            raise UnavailableError(f"checkpoint {path} may be whole, but is not to be had: {gone[0]}")
        problems = [text for text, _, _ in answers if text]
        if not problems and len({digest for _, digest, _ in answers}) > 1:
            raise CheckpointError(
                f"{root.url}/{path}: its manifest is whole on all ranks, and not the same on all of them: "
                "they look at different storages. Set checkpoint.url, or run, to one that all nodes share"
            )
        if not problems:
            say_changes(config, checkpoint, say)
            return checkpoint
        say(f"passing over checkpoint {path}: {problems[0]}")
    if paths:
        raise CheckpointError(
            f"{root.url}: none of its {len(paths)} checkpoints can be read; start a new run"
        )
    return None
