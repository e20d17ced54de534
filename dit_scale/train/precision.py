"""The precision of a run: `engine.precision: auto` resolved once, identically on all ranks."""

from contextlib import suppress

from dit_scale import dist
from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.manifest import read_manifest
from dit_scale.choices import attention_problem
from dit_scale.config import TrainConfig
from dit_scale.dist import World
from dit_scale.errors import CheckpointError, ConfigError
from dit_scale.train.run_folder import root_of


def choose_precision(config: TrainConfig, world: World) -> tuple[TrainConfig, str]:
    """The configuration with `engine.precision: auto` resolved, and the reason in one line.

    A run keeps the precision of its newest checkpoint. A new run uses what suits the device of rank 0. Raises
    ConfigError when the attention backend cannot compute in that precision on this device.
    """
    config, note = _resolve(config, world)
    engine = config.engine
    problem = attention_problem(
        config.model.attention, engine.precision, engine.determinism, world.device.type
    )
    if problem:
        raise ConfigError("; ".join(filter(None, (problem, note))))
    return config, note


def _resolve(config: TrainConfig, world: World) -> tuple[TrainConfig, str]:
    configured = config.engine.precision
    fast_bf16 = dist.multiplies_bf16(world.device)
    if configured != "auto":
        is_slow = configured == "bf16" and not fast_bf16
        return config, f"precision bf16: {dist.SLOW_BF16}" if is_slow else ""

    def choose() -> tuple[str, str]:
        root = root_of(config)
        for checkpoint_id in attempts.committed(root):
            with suppress(CheckpointError):  # reported when it is restored
                return read_manifest(root, checkpoint_id).config["engine"][
                    "precision"
                ], "the precision of the newest checkpoint"
        reason = "multiplies bf16 in hardware" if fast_bf16 else "has no bf16 instructions"
        return dist.choose_precision("auto", world.device), f"this {world.device.type.upper()} {reason}"

    chosen, reason = world.broadcast(choose)
    engine = config.engine.model_copy(update={"precision": chosen})
    return config.model_copy(update={"engine": engine}), f"precision auto: {chosen}, {reason}"
