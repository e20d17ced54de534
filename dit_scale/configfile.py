"""What people write of a configuration: YAML files and `key=value` overrides.

A value is read by the type of its key, never by how it looks: YAML 1.1 takes `010` for 8, `1:30` for 90,
`on` for true, `2024-01-01` for a date and `1e5` for a word. Here plain values stay text, except `null`, `~`
and nothing at all, and `typed` makes whole numbers and lists of those whose keys want them.
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
    """YAML whose plain values are text, and whose mappings have each key once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"the key {key.value!r} is there twice, on line {lines[key.value]} and on line {line}; "
                    "keep one"
                )
            lines[key.value] = line
        return node


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), [*"~nN", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


@dataclass(frozen=True)
class Override:
    """A `key=value` of the command line."""

    text: str
    keys: tuple[str, ...]
    value: Any


def read_file(path: Path) -> Tree:
    """The tree in a YAML file. Raises ConfigError that names the file, and the line where there is one."""
    try:
        tree = _parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: expected keys and values at the top level, got {type(tree).__name__}")
    return tree or {}


def _parse(text: str | bytes) -> Any:
    return yaml.load(text, _Loader)


def read_override(text: str) -> Override:
    """`optimizer.lr=2e-4`; the value is text unless it begins with a bracket, a brace or a quote: then YAML.

    Raises ConfigError that says how to write one.
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
            f"{COMMAND_LINE}: {text!r}: the value is not valid YAML; text that begins with {value[0]} needs "
            f"quotes, as in \"{key}='...'\": {error}"
        ) from None


def put(root: type[BaseModel], tree: Tree, override: Override) -> None:
    """Set an override's key in the tree; a number leads into a list: `ema.0.decay`, `optimizer.betas.1`.

    Raises ConfigError where the way leads through a value, or behind the end of a list.
    """
    inner: Any = tree
    for depth, key in enumerate(override.keys):
        parent = ".".join(override.keys[:depth])
        if isinstance(inner, list):
            if not (key.isdecimal() and int(key) < len(inner)):
                raise ConfigError(
                    f"{COMMAND_LINE}: {override.text!r}: expected a number below {len(inner)} behind "
                    f"{parent}, got {key!r}; {parent}=[...] sets the whole list"
                )
            place: Any = int(key)
        elif isinstance(inner, dict):
            place = key
        else:
            raise ConfigError(f"{COMMAND_LINE}: {override.text!r}: {parent} holds a value, not a section")
        if depth + 1 == len(override.keys):
            inner[place] = override.value
        else:
            if isinstance(inner, dict) and inner.get(key) is None:
                inner[key] = _empty(root, override.keys, depth)
            inner = inner[place]


def _empty(root: type[BaseModel], keys: Sequence[str], depth: int) -> Any:
    """What an override finds where the tree has nothing: the default list, or an empty section."""
    if keys[depth + 1].isdecimal():
        default: Any = root()
        for key in keys[: depth + 1]:
            default = getattr(default, key, None)
        if isinstance(default, tuple):
            return to_jsonable_python(default, exclude_none=True)
    return {}


def typed(annotation: Any, value: Any) -> Any:
    """A tree of text as its type has it: with numbers, and lists where there are commas.

    Sections and lists of which nothing is said are left out, so that their defaults count. What does not fit
    stays as it is, for the type to refuse.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return typed(args[0], value)
    if origin in (Union, types.UnionType):
        return value if value is None else typed(next(arg for arg in args if arg is not type(None)), value)
    if is_section(annotation):
        return _typed_section(annotation, value) if isinstance(value, dict) else value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) and value else value
        if not isinstance(items, list):
            return value
        kinds = args[:1] * len(items) if args[-1] is ... else [*args, *args[-1:] * len(items)]
        return [typed(kind, item) for kind, item in zip(kinds, items, strict=False)]
    kind = type(args[0]) if origin is Literal else annotation
    return _number(value, kind) if kind in (int, float) and isinstance(value, str) else value


def _typed_section(section: type[BaseModel], tree: Tree) -> Tree:
    found = {}
    for key, value in tree.items():
        kind = section.model_fields[key].annotation if key in section.model_fields else None
        if value is not None or not (is_section(kind) or get_origin(kind) is tuple):
            found[key] = typed(kind, value)
    return found


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Whether the type of a key is a group of keys."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _number(text: str, kind: type) -> float | str:
    """`7`, `010` (ten), `1_000`, `1e5` as a whole number or not, `0.5`; other text as it is."""
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
    """What does not fit, a line each, and whether the file or the command line says so."""
    lines = []
    for problem in error.errors():
        where = blamed([str(part) for part in problem["loc"]], path, overrides)
        lines.append(f"{where}: {_told(root, problem)}" if where else _told(root, problem))
    return "\n".join(lines)


def _told(root: type[BaseModel], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; did you mean {nearest(key, [*_known_keys(root, problem['loc'])])!r}?"
    if problem["type"] == "value_error":  # one of ours, which tells what it got
        said = str(problem["ctx"]["error"])
        return f"{key}: {said}" if key else said
    got = "nothing" if problem["input"] is None else repr(problem["input"])
    return f"{key or root.__name__}: {problem['msg']}, got {got}"


def blamed(loc: list[str], path: str | Path | None, overrides: Sequence[Override]) -> str:
    """The file, the command line, or both, where either may have part in what a section has as a whole."""
    given = [list(override.keys) for override in overrides]
    if any(loc[: len(keys)] == keys for keys in given):
        return COMMAND_LINE
    if any(keys[: len(loc)] == loc for keys in given):
        return f"{path} and {COMMAND_LINE}" if path else COMMAND_LINE
    return str(path) if path else ""


def nearest(key: str, known: Sequence[str]) -> str:
    """The known key that was most likely meant."""
    # A key that was put into the wrong section is nearest to its own last word.
    near = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    return (near or difflib.get_close_matches(key, known, n=1, cutoff=0.0))[0]


def _known_keys(
    section: type[BaseModel], loc: Sequence[int | str] = (), prefix: str = "", depth: int = 0
) -> Iterator[str]:
    """All keys; those of a list's items with the number of the item that `loc` leads to."""
    for name, field in section.model_fields.items():
        key = prefix + name
        yield key
        if is_section(field.annotation):
            yield from _known_keys(field.annotation, loc, f"{key}.", depth + 1)
        for item in get_args(field.annotation):
            if is_section(item) and loc[depth : depth + 1] == (name,) and len(loc) > depth + 1:
                yield from _known_keys(item, loc, f"{key}.{loc[depth + 1]}.", depth + 2)
