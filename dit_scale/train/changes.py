"""What differs between the configuration that a checkpoint was saved with and the present one.

Some keys may not change within a run (docs/determinism.md); of the others each change is said in a line.
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

BOUND_KEYS = ("seed", "global_batch", "data.horizontal_flip", "data.window_shards")
BOUND_SECTIONS = ("model.", "diffusion.")
FREE_KEYS = ("model.attention",)


def identity(config: TrainConfig) -> dict[str, Any]:
    """The knobs that decide which numbers a run computes: they may not change within one run."""
    return {
        key: value
        for key, value in _flat(config.model_dump(mode="json")).items()
        if key in BOUND_KEYS or (key.startswith(BOUND_SECTIONS) and key not in FREE_KEYS)
    }


def check_same_run(config: TrainConfig, data_sha256: str, checkpoint: Checkpoint) -> None:
    """Raises ConfigError when the checkpoint is of a run with another identity or data set."""
    before, now = identity(checkpoint.config), identity(config)
    changed = [f"{key} was {before[key]}, is {now[key]}" for key in now if before[key] != now[key]]
    if checkpoint.manifest.data_sha256 != data_sha256:
        changed.append("data.url holds another latent data set")
    if changed:
        raise ConfigError(
            f"{config.run} is a run of another configuration: {'; '.join(changed)}. "
            "Restore the values to resume it, or choose another run=FOLDER"
        )


def say_changes(config: TrainConfig, checkpoint: Checkpoint, say: Say) -> None:
    """Name each key that differs from what was saved, and the learning rate if the next step has another."""
    saved, step = checkpoint.config, checkpoint.manifest.step
    for line in differences(saved, config):
        say(line)
    was, now = (learning_rate(one.optimizer, step, one.steps) for one in (saved, config))
    if was != now and step < config.steps:
        say(f"the learning rate of step {step + 1} is {now:.3g}; as saved it would be {was:.3g}")


def differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    """A line for each key: `optimizer.lr: 0.0001 -> 0.0002`. What changed in `ema`, `averages` tells."""
    with suppress(ConfigError):  # older runs were saved with relative paths
        before, now = with_absolute_paths(before), with_absolute_paths(now)
    old, new = (_flat(config.model_dump(mode="json", exclude={"ema"})) for config in (before, now))
    return [f"{key}: {_text(old[key])} -> {_text(new[key])}" for key in new if old[key] != new[key]]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
