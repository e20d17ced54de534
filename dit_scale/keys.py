"""The keys of a configuration as data: type, default and help text, taken from the classes in config.py."""

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from dit_scale.configfile import is_section, nearest
from dit_scale.errors import ConfigError

LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "multiple of"}


@dataclass(frozen=True)
class Key:
    """A key, for example `optimizer.lr`. `ema[].decay` is the key `decay` of every item of the list `ema`."""

    key: str
    type: str
    default: Any
    """Default as a JSON value; None if `required`."""
    required: bool
    doc: str


@dataclass(frozen=True)
class KeyGroup:
    """The keys of a section."""

    name: str
    """Dotted name, for example `optimizer`; empty for the root."""
    doc: str
    keys: tuple[Key, ...]


def groups(root: type[BaseModel], wanted: Sequence[str] = ()) -> list[KeyGroup]:
    """Return all sections and their keys, or only those in `wanted`. Raises ConfigError for unknown names."""
    sections = list(_groups(root, ""))
    names = [name for group in sections for name in (group.name, *(key.key for key in group.keys)) if name]
    for name in wanted:
        if name not in names:
            raise ConfigError(f"unknown key {name!r}; did you mean {nearest(name, names)!r}?")
    if not wanted:
        return sections
    kept = (
        KeyGroup(group.name, group.doc, tuple(key for key in group.keys if _is_wanted(key.key, wanted)))
        for group in sections
    )
    return [group for group in kept if group.keys]


def _is_wanted(key: str, wanted: Sequence[str]) -> bool:
    return any(key == name or key.startswith((f"{name}.", f"{name}[].")) for name in wanted)


def _groups(section: type[BaseModel], name: str) -> Iterator[KeyGroup]:
    keys: list[Key] = []
    inner: list[tuple[Any, str]] = []
    for field_name, field in section.model_fields.items():
        key = f"{name}.{field_name}" if name else field_name
        if is_section(field.annotation):
            inner.append((field.annotation, key))
            continue
        keys.append(_key(key, field))
        inner += [(item, f"{key}[]") for item in get_args(field.annotation) if is_section(item)]
    yield KeyGroup(name, _one_line(section.__doc__), tuple(keys))
    for part, key in inner:
        yield from _groups(part, key)


def _key(key: str, field: FieldInfo) -> Key:
    required = field.is_required()
    default = None if required else to_jsonable_python(field.default, exclude_none=True)
    return Key(key, _type(field.annotation, field.metadata), default, required, _one_line(field.description))


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Format a type for people: `float >= 0, < 1`, `bf16 | fp32`, `[float, float]`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(args[0], [limit for entry in args[1:] for limit in getattr(entry, "metadata", [entry])])
    if origin in (Union, types.UnionType):
        return " | ".join("null" if arg is type(None) else _type(arg, metadata) for arg in args)
    if origin is Literal:
        text = " | ".join(map(str, args))
    elif origin is tuple:
        text = f"[{', '.join('...' if arg is ... else _type(arg) for arg in args)}]"
    elif is_section(annotation):
        text = f"{{{', '.join(annotation.model_fields)}}}"
    else:
        text = annotation.__name__
    limits = [
        f"{sign} {getattr(entry, name)}"
        for entry in metadata
        for name, sign in LIMITS.items()
        if getattr(entry, name, None) is not None
    ]
    return f"{text} {', '.join(limits)}" if limits else text


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
