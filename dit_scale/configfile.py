"""Parse configurations: YAML files and `key=value` overrides.

The type of the key decides how a value is read, not its spelling. YAML 1.1 would read `010` as 8, `1:30` as
90, `on` as true, `2024-01-01` as a date and `1e5` as a string. Here every plain value stays text, except
`null`, `~` and an empty value, and `coerce` converts it to the number or list that its key expects.
"""

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from dit_scale.errors import ConfigError

COMMAND_LINE = "command line"
Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """A YAML loader that keeps plain values as text and rejects duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"duplicate key {key.value!r} on line {lines[key.value]} and on line {line}; remove one"
                )
            lines[key.value] = line
        return node


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), [*"~nN", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


@dataclass(frozen=True)
class Override:
    """A `key=value` argument of the command line."""

    text: str
    keys: tuple[str, ...]
    value: Any


def read_file(path: Path) -> Tree:
    """Parse a YAML file. Raises ConfigError with the file name, and with the line if it is known."""
    try:
        tree = _parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: expected keys and values at the top level, got {type(tree).__name__}")
    return tree or {}


def _parse(text: str | bytes) -> Any:
    return yaml.load(text, _Loader)


def read_override(text: str) -> Override:
    """Parse an override such as `optimizer.lr=2e-4`.

    A value that starts with a bracket, brace or quote is YAML; any other value is text. Raises ConfigError,
    with an example of the syntax, if it is not `key=value` or not valid YAML.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise ConfigError(f"{COMMAND_LINE}: {text!r}: expected key=value, for example optimizer.lr=2e-4")
    if value[:1] not in ("[", "{", "'", '"'):
        return Override(text, tuple(key.split(".")), None if value == "null" else value)
    try:
        return Override(text, tuple(key.split(".")), _parse(value))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{COMMAND_LINE}: {text!r}: the value is not valid YAML; text that starts with {value[0]} needs "
            f"quotes, as in \"{key}='...'\": {error}"
        ) from None


def apply_override(root: type[BaseModel], tree: Tree, override: Override) -> None:
    """Apply an override to the tree in place. A number indexes a list: `ema.0.decay`, `optimizer.betas.1`.

    Raises ConfigError if the key goes through a value that is not a section, or past the end of a list.
    """
    inner: Any = tree
    for depth, key in enumerate(override.keys):
        parent = ".".join(override.keys[:depth])
        if isinstance(inner, list):
            if not (key.isdecimal() and int(key) < len(inner)):
                raise ConfigError(
                    f"{COMMAND_LINE}: {override.text!r}: expected an index below {len(inner)} after "
                    f"{parent}, got {key!r}; {parent}=[...] replaces the list"
                )
            place: Any = int(key)
        elif isinstance(inner, dict):
            place = key
        else:
            raise ConfigError(f"{COMMAND_LINE}: {override.text!r}: {parent} is a value, not a section")
        if depth + 1 == len(override.keys):
            inner[place] = override.value
        else:
            if isinstance(inner, dict) and inner.get(key) is None:
                inner[key] = _starting_value(root, override.keys, depth)
            inner = inner[place]


def _starting_value(root: type[BaseModel], keys: Sequence[str], depth: int) -> Any:
    """Return what an override extends when the tree lacks the key: the default list or an empty section."""
    if keys[depth + 1].isdecimal():
        default: Any = root()
        for key in keys[: depth + 1]:
            default = getattr(default, key, None)
        if isinstance(default, tuple):
            return to_jsonable_python(default, exclude_none=True)
    return {}


def coerce(annotation: Any, value: Any) -> Any:
    """Convert a tree of text to the types of its keys: numbers, and lists from comma-separated text.

    Empty sections and lists are dropped, so their defaults apply. A value that cannot be converted stays as
    it is, and validation rejects it.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return coerce(args[0], value)
    if origin in (Union, types.UnionType):
        return value if value is None else coerce(next(arg for arg in args if arg is not type(None)), value)
    if is_section(annotation):
        return _coerce_section(annotation, value) if isinstance(value, dict) else value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) and value else value
        if not isinstance(items, list):
            return value
        kinds = args[:1] * len(items) if args[-1] is ... else [*args, *args[-1:] * len(items)]
        return [coerce(kind, item) for kind, item in zip(kinds, items, strict=False)]
    kind = type(args[0]) if origin is Literal else annotation
    return _number(value, kind) if kind in (int, float) and isinstance(value, str) else value


def _coerce_section(section: type[BaseModel], tree: Tree) -> Tree:
    coerced = {}
    for key, value in tree.items():
        kind = section.model_fields[key].annotation if key in section.model_fields else None
        if value is not None or not (is_section(kind) or get_origin(kind) is tuple):
            coerced[key] = coerce(kind, value)
    return coerced


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Whether the type of a key is a section."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _number(text: str, kind: type) -> float | str:
    """Convert text such as `7`, `010` (ten), `1_000`, `1e5` or `0.5`; return other text unchanged."""
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        with suppress(ValueError):
            if float(text).is_integer():
                return int(float(text))
    return text


def explain(
    root: type[BaseModel], error: ValidationError, path: str | Path | None, overrides: Sequence[Override]
) -> str:
    """Format validation errors, one per line, each with its origin: the file, the command line or both."""
    lines = []
    for problem in error.errors():
        where = origin_of([str(part) for part in problem["loc"]], path, overrides)
        lines.append(f"{where}: {_describe(root, problem)}" if where else _describe(root, problem))
    return "\n".join(lines)


def _describe(root: type[BaseModel], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; did you mean {nearest(key, [*_known_keys(root, problem['loc'])])!r}?"
    if problem["type"] == "value_error":  # raised by our own validators, whose messages include the value
        message = str(problem["ctx"]["error"])
        return f"{key}: {message}" if key else message
    got = "nothing" if problem["input"] is None else repr(problem["input"])
    return f"{key or root.__name__}: {problem['msg']}, got {got}"


def origin_of(loc: list[str], path: str | Path | None, overrides: Sequence[Override]) -> str:
    """Where the value at `loc` was set: the file, the command line, or both for a section that both set."""
    overridden = [list(override.keys) for override in overrides]
    if any(loc[: len(keys)] == keys for keys in overridden):
        return COMMAND_LINE
    if any(keys[: len(loc)] == loc for keys in overridden):
        return f"{path} and {COMMAND_LINE}" if path else COMMAND_LINE
    return str(path) if path else ""


def nearest(key: str, known: Sequence[str]) -> str:
    """The known key that the user most likely meant."""
    # A key in the wrong section has the right last part.
    near = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    return (near or difflib.get_close_matches(key, known, n=1, cutoff=0.0))[0]


def _known_keys(
    section: type[BaseModel], loc: Sequence[int | str] = (), prefix: str = "", depth: int = 0
) -> Iterator[str]:
    """Yield all keys; the keys of list items carry the index in `loc`."""
    for name, field in section.model_fields.items():
        key = prefix + name
        yield key
        if is_section(field.annotation):
            yield from _known_keys(field.annotation, loc, f"{key}.", depth + 1)
        for item in get_args(field.annotation):
            if is_section(item) and loc[depth : depth + 1] == (name,) and len(loc) > depth + 1:
                yield from _known_keys(item, loc, f"{key}.{loc[depth + 1]}.", depth + 2)
