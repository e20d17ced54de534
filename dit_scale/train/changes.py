"""Differences between the configuration in a checkpoint and the current one.

Some keys must not change within a run (docs/determinism.md). Every other change is reported in one line.
"""

import json
from contextlib import suppress
from typing import Any

from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.errors import ConfigError
from dit_scale.lines import Say
from dit_scale.paths import with_absolute_paths
from dit_scale.train.optim import learning_rate
from dit_scale.trees import differing, flat

BOUND_KEYS = ("seed", "global_batch", "data.horizontal_flip", "data.window_shards", "evaluate.held_out")
BOUND_SECTIONS = ("model.", "diffusion.")
FREE_KEYS = ("model.attention",)


def identity(config: TrainConfig) -> dict[str, Any]:
    """The keys that determine which numbers a run computes: they must not change within a run."""
    values = flat(config.model_dump(mode="json"))
    # The seed of the evaluation selects the held-out samples, if there are any.
    bound = (*BOUND_KEYS, "evaluate.seed") if config.evaluate.held_out else BOUND_KEYS
    return {
        key: value
        for key, value in values.items()
        if key in bound or (key.startswith(BOUND_SECTIONS) and key not in FREE_KEYS)
    }


def check_same_run(config: TrainConfig, data_sha256: str, checkpoint: Checkpoint) -> None:
    """Raise ConfigError when the checkpoint belongs to a run with another identity or data set."""
    before, now = identity(checkpoint.config), identity(config)
    both = before.keys() & now.keys()
    changed = [
        f"{key} was {before[key]}, is {now[key]}" for key in now if key in both and before[key] != now[key]
    ]
    if checkpoint.manifest.data_sha256 != data_sha256:
        changed.append("data.url leads to another latent data set")
    if changed:
        raise ConfigError(
            f"{config.run} holds a run with another configuration: {'; '.join(changed)}. "
            "Restore these values to resume it, or choose another run=FOLDER"
        )


def say_changes(config: TrainConfig, checkpoint: Checkpoint, say: Say) -> None:
    """Report each key that differs from the saved one, and a change of the next step's learning rate."""
    saved, step = checkpoint.config, checkpoint.manifest.step
    for line in differences(saved, config):
        say(line)
    was, now = (learning_rate(one.optimizer, step, one.steps) for one in (saved, config))
    if was != now and step < config.steps:
        say(f"the learning rate of step {step + 1} is {now:.3g}; with the saved values it would be {was:.3g}")


def differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    """One line per key: `optimizer.lr: 0.0001 -> 0.0002`. `averages` reports changes of `ema`."""
    with suppress(ConfigError):  # older runs saved relative paths
        before, now = with_absolute_paths(before), with_absolute_paths(now)
    changed = differing([config.model_dump(mode="json", exclude={"ema"}) for config in (before, now)])
    return [f"{key}: {_text(old)} -> {_text(new)}" for key, (old, new) in changed.items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
