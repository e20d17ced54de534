"""Make the paths of a configuration absolute, once, when it is read.

Saved paths then stay valid in any working directory, and no other part of the program expands `~`, file://
or relative paths.
"""

import os.path
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

from pydantic import BaseModel

from dit_scale.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)
Origin = Callable[[str], str]


class PathKind(Enum):
    """What a path key refers to; part of the key's annotation."""

    FOLDER = "a folder"
    FILE = "a file"
    NETWORK = "KIND:PATH"
    """A kind of feature network and the file or folder of its weights."""
    STORAGE = "a folder, file:///folder or s3://bucket/prefix"
    VAE = "a folder or a hub name"
    """Text that could be a hub name means a folder only if that folder exists."""
    CACHE = "a folder on the node's own disk"
    """Not every run needs it, so `~` stays unexpanded when there is no home directory."""


def with_absolute_paths(
    config: Config, keep_relative: bool = False, origin: Origin = lambda key: ""
) -> Config:
    """Return the configuration with absolute paths.

    `keep_relative` leaves relative paths alone, for a caller whose working directory is not the user's.
    Raises ConfigError for an invalid path; `origin` returns where a key was set, for the message.
    """

    def change(key: str, text: str, kind: PathKind) -> str:
        try:
            return absolute(text, kind, keep_relative)
        except ValueError as error:
            where = origin(key)
            raise ConfigError(f"{where}: {key} {error}" if where else f"{key} {error}") from None

    return _mapped(config, change)


def without_paths(config: Config) -> Config:
    """Return the configuration with all paths blank, to compare nodes whose folders have different names."""
    return _mapped(config, lambda key, text, kind: "")


def absolute(text: str, kind: PathKind, keep_relative: bool = False) -> str:
    """Expand `~`, file:// and relative paths; return S3 URLs and hub names unchanged.

    Raises ValueError, with what was expected, for any other text.
    """
    if not text.strip():
        raise ValueError(f"is empty: expected {kind.value}; check the shell variable that it comes from")
    if kind is PathKind.NETWORK:
        name, _, path = text.partition(":")
        if not path or not name.isidentifier():
            raise ValueError(f"is {text}: expected {kind.value}")
        return f"{name}:{absolute(path, PathKind.FILE, keep_relative)}"
    scheme, separator, rest = text.partition("://")
    if separator and scheme == "s3" and kind is PathKind.STORAGE:
        return text
    if separator and not (scheme == "file" and rest.startswith("/")):
        raise ValueError(f"is {text}: expected {kind.value}")
    path = rest if separator else os.path.expanduser(text)
    if not separator and path.startswith("~"):
        if kind is PathKind.CACHE:
            return text
        raise ValueError(f"is {text}: its home directory is unknown; expected an absolute path")
    if (
        kind is PathKind.VAE
        and not path.startswith(("/", "./", "../"))
        and not os.path.isdir(os.path.abspath(path))
    ):
        return text
    return path if keep_relative and not os.path.isabs(path) else os.path.abspath(path)


def _mapped(config: Config, change: Callable[[str, str, PathKind], str], prefix: str = "") -> Config:
    """Return the configuration with `change(key, text, kind)` applied to every path."""
    update: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            update[name] = _mapped(value, change, f"{key}.")
        for kind in field.metadata:
            if isinstance(kind, PathKind) and (value or field.default):  # checkpoint.url may be empty
                update[name] = change(key, value, kind)
    return config.model_copy(update=update)
