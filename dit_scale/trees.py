"""JSON objects as flat dictionaries with dotted keys, to compare and to name what differs."""

from collections.abc import Mapping
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
