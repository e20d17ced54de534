"""Paths of a configuration, made absolute once, where it is read.

So what a run saves of them is true in any other folder, and no part of the program expands `~`, file:// or a
relative path of its own accord.
"""

import os.path
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

from pydantic import BaseModel

from dit_scale.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)
Blame = Callable[[str], str]


class PathKind(Enum):
    """What the text of a key leads to; stands in the key's annotation."""

    FOLDER = "a folder"
    STORAGE = "a folder, file:///folder or s3://bucket/prefix"
    VAE = "a folder or a hub name"
    """Text that may be a hub name is a folder only if there is one."""
    CACHE = "a folder on the node's own disk"
    """Not every run needs it, so it stays as it is where `~` leads nowhere."""


def with_absolute_paths(config: Config, keep_relative: bool = False, blame: Blame = lambda key: "") -> Config:
    """The same configuration with absolute paths.

    With `keep_relative`, for a caller that does not stand where the user does, relative paths stay. Raises
    ConfigError for a path that cannot be one; `blame` says where a key was set.
    """

    def change(key: str, text: str, place: PathKind) -> str:
        try:
            return absolute(text, place, keep_relative)
        except ValueError as error:
            where = blame(key)
            raise ConfigError(f"{where}: {key} {error}" if where else f"{key} {error}") from None

    return _mapped(config, change)


def without_paths(config: Config) -> Config:
    """What is left of a configuration where folders have other names, as on another node."""
    return _mapped(config, lambda key, text, place: "")


def absolute(text: str, place: PathKind, keep_relative: bool = False) -> str:
    """The absolute path behind `~`, file:// or a relative path; urls of S3 and hub names as they are.

    Raises ValueError that says what was expected.
    """
    if not text.strip():
        raise ValueError(f"is empty: expected {place.value}; check the shell variable that it comes from")
    scheme, separator, rest = text.partition("://")
    if separator and scheme == "s3" and place is PathKind.STORAGE:
        return text
    if separator and not (scheme == "file" and rest.startswith("/")):
        raise ValueError(f"is {text}: expected {place.value}")
    path = rest if separator else os.path.expanduser(text)
    if not separator and path.startswith("~"):
        if place is PathKind.CACHE:
            return text
        raise ValueError(f"is {text}: no home directory is known for it; expected an absolute path")
    if (
        place is PathKind.VAE
        and not path.startswith(("/", "./", "../"))
        and not os.path.isdir(os.path.abspath(path))
    ):
        return text
    return path if keep_relative and not os.path.isabs(path) else os.path.abspath(path)


def _mapped(config: Config, change: Callable[[str, str, PathKind], str], prefix: str = "") -> Config:
    """The same configuration with each path changed; `change` is given key, text and what it leads to."""
    update: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            update[name] = _mapped(value, change, f"{key}.")
        for place in field.metadata:
            if isinstance(place, PathKind) and (value or field.default):  # checkpoint.url may be empty
                update[name] = change(key, value, place)
    return config.model_copy(update=update)
