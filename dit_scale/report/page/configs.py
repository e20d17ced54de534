"""What the configurations of runs differ in: from the nearest recipe, and from each other."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from dit_scale import recipes
from dit_scale.config import TrainConfig, load
from dit_scale.errors import ConfigError
from dit_scale.paths import without_paths
from dit_scale.trees import flat

ABSENT = "-"
"""Shown for a key that a configuration does not have."""
MAX_TEXT = 200
"""Characters of a value."""


@dataclass(frozen=True)
class Recipe:
    """The recipe that is most like a run."""

    name: str
    differing: int
    """Keys that differ, without paths."""


@dataclass(frozen=True)
class Keys:
    """A configuration as text by dotted key."""

    text: dict[str, str]
    paths: frozenset[str]
    """Keys that hold a path."""


NO_KEYS = Keys({}, frozenset())


def keys_of(config: TrainConfig) -> Keys:
    """Return a configuration as text."""
    values, blank = (flat(one.model_dump(mode="json")) for one in (config, without_paths(config)))
    text = {key: _text(value) for key, value in values.items()}
    return Keys(text, frozenset(key for key in values if values[key] != blank[key]))


def nearest_recipe(config: TrainConfig) -> Recipe:
    """Return the recipe of a training run with the fewest keys that differ; paths do not count."""
    own = flat(without_paths(config).model_dump(mode="json"))
    counts = {name: _differing(recipe, own) for name, recipe in _recipes().items()}
    name = min(counts, key=lambda name: (counts[name], name))
    return Recipe(name, counts[name])


def differences(recipe: Recipe | None, runs: Sequence[Keys]) -> dict[str, list[str]]:
    """Return the values of the recipe and of each run for every key in which they differ.

    A path counts only if it differs between runs, and the run folder never does.
    """
    expected = keys_of(_load(recipe.name)).text if recipe else {}
    found = {}
    for key in dict.fromkeys([*expected, *(key for run in runs for key in run.text)]):
        values = [run.text.get(key, ABSENT) for run in runs]
        is_free = recipe is None or any(key in run.paths for run in runs)
        compared = values if is_free else [expected.get(key, ABSENT), *values]
        if len(set(compared)) > 1 and key != "run":
            found[key] = [expected.get(key, ABSENT), *values]
    return found


@cache
def _recipes() -> dict[str, dict[str, Any]]:
    """Return the recipes of training runs by name: values by dotted key, without paths."""
    found = {}
    for name in recipes.names():
        with suppress(ConfigError):  # the recipe of an encoding job or of a study
            found[name] = flat(without_paths(_load(name)).model_dump(mode="json"))
    return found


def _load(name: str) -> TrainConfig:
    """Return the recipe of a training run. Raises ConfigError for another recipe."""
    return load(TrainConfig, recipes.FOLDER / f"{name}.yaml", keep_relative=True)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> int:
    return sum(one.get(key, ABSENT) != other.get(key, ABSENT) for key in one.keys() | other.keys())


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."
