"""Finding the checkpoint to resume from and filling it in, on all ranks together."""

import hashlib
from collections.abc import Callable

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.dist import World
from dit_scale.errors import CheckpointError, ConfigError
from dit_scale.lines import Say
from dit_scale.storage import UnavailableError
from dit_scale.train.changes import check_same_run, say_changes
from dit_scale.train.run_folder import root_of


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
    ids, lost = world.broadcast(lambda: (attempts.committed(root), attempts.unrecorded(root)))
    for number in lost:
        say(f"attempts/{number:04d}.json is missing; attempt {number} counts as far as it can be read")
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
    if ids:
        raise CheckpointError(f"{root.url}: none of its {len(ids)} checkpoints can be read; start a new run")
    return None
