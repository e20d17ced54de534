"""Finding the checkpoint to resume from and filling it in, on all ranks together."""

import hashlib
from collections.abc import Callable

from torch import Tensor

from dit_scale.checkpoint import attempts, reader
from dit_scale.checkpoint.partition import MASTER, OPTIMIZER_KINDS
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.dist import World
from dit_scale.errors import CheckpointError, ConfigError
from dit_scale.heartbeat import Phase
from dit_scale.lines import Say
from dit_scale.storage import UnavailableError
from dit_scale.train.averages import restored_kinds
from dit_scale.train.changes import check_same_run, say_changes
from dit_scale.train.context import RunContext
from dit_scale.train.run_folder import root_of
from dit_scale.train.trainer import Trainer


def restore(
    context: RunContext, trainer: Trainer, say: Say, *, step: int, at_most_step: int | None = None
) -> Checkpoint | None:
    """Restore the newest checkpoint into `trainer` and return it; without one, set the initial state.

    Heartbeats report `step` meanwhile. Raises what `find_checkpoint` raises.
    """

    def fill(checkpoint: Checkpoint) -> None:
        """Read what this rank owns. No collectives: a rank that cannot read must not keep others waiting."""
        notes: list[str] = []
        old_kinds, new_kinds = restored_kinds(context.config, checkpoint, notes.append)

        def read(kind: str, parameter: str, start: int, length: int) -> Tensor:
            context.heart.beat(Phase.RESTORE, step)
            return checkpoint.read(kind, parameter, start, length)

        owned = trainer.engine.owned
        try:
            reader.fill(owned, (*OPTIMIZER_KINDS, *old_kinds), read)
            reader.fill(owned, new_kinds, lambda _, *where: read(MASTER, *where))
        finally:
            context.heart.beat(Phase.RESTORED, step)
        for note in notes:
            say(note)

    context.heart.beat(Phase.RESTORE, step)
    checkpoint = find_checkpoint(
        context.config, context.data_sha256, context.world, fill, say, at_most_step=at_most_step
    )
    context.heart.beat(Phase.RESTORED, step)
    if checkpoint is None:
        trainer.start()
    else:
        trainer.resume(checkpoint.manifest.guard)
    return checkpoint


def find_checkpoint(
    config: TrainConfig,
    data_sha256: str,
    world: World,
    fill: Callable[[Checkpoint], None],
    say: Say,
    *,
    at_most_step: int | None = None,
) -> Checkpoint | None:
    """Fill in the newest checkpoint that all ranks can read; return it, or None when the run has none.

    Names and skips damaged checkpoints, and skips those newer than `at_most_step`.

    Raises:
        ConfigError: the run belongs to another configuration or data set, or the ranks see different ones.
        CheckpointError: all checkpoints are damaged, or the ranks see different ones under one name.
        UnavailableError: the storage does not answer. Nothing is skipped for that.
    """
    if len(set(world.gather(data_sha256))) > 1:
        raise ConfigError(
            f"data.url={config.data.url} is not the same latent data set on all ranks; it must lead to the "
            "same data set, or to an exact copy, on every node"
        )
    root = root_of(config)
    ids, unrecorded = world.broadcast(lambda: (attempts.committed(root), attempts.unrecorded(root)))
    for number in unrecorded:
        say(f"attempts/{number:04d}.json is missing; the readable checkpoints of attempt {number} count")
    if at_most_step is not None:
        ids = [checkpoint_id for checkpoint_id in ids if checkpoint_id.step <= at_most_step]
    for checkpoint_id in ids:
        path = checkpoint_id.path()
        problem, digest, unavailable = "", "", False
        try:
            checkpoint = Checkpoint(root, checkpoint_id)
            digest = hashlib.sha256(checkpoint.manifest.model_dump_json().encode()).hexdigest()
            check_same_run(config, data_sha256, checkpoint)
            fill(checkpoint)
        except CheckpointError as error:
            problem = str(error)
        except UnavailableError as error:
            problem, unavailable = str(error), True
        answers = world.gather((problem, digest, unavailable))
        if outages := [text for text, _, is_unavailable in answers if is_unavailable]:
            raise UnavailableError(
                f"checkpoint {path} may be intact, but the storage is unavailable: {outages[0]}"
            )
        problems = [text for text, _, _ in answers if text]
        if not problems and len({digest for _, digest, _ in answers}) > 1:
            raise CheckpointError(
                f"{root.url}/{path}: the ranks read different manifests under this name, each intact: they "
                "use different storages. Set checkpoint.url, or run, to a storage that all nodes share"
            )
        if not problems:
            say_changes(config, checkpoint, say)
            return checkpoint
        say(f"skipping checkpoint {path}: {problems[0]}")
    if ids:
        raise CheckpointError(f"{root.url}: none of its {len(ids)} checkpoints can be read; start a new run")
    return None
