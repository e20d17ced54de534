"""JSON objects as flat dictionaries with dotted keys, to compare and to name what differs."""

from collections.abc import Mapping, Sequence
from typing import Any


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested objects by dotted keys; items of a list of objects are numbered from 0."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            values |= flat(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                values |= flat(item, f"{key}.{number}.")
        else:
            values[key] = value
    return values


def differing(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the dotted keys that are not equal in all trees, with the value of each tree; None if missing.

    The keys are in the order in which the trees name them, those of the first tree first.
    """
    flats = [flat(tree) for tree in trees]
    keys = dict.fromkeys(key for values in flats for key in values)
    rows = {key: [values.get(key) for values in flats] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}
