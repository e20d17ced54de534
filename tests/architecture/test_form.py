"""The laws of form: the length of files, functions and classes, the attributes of objects, calls, text."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.architecture.source import (
    FUNCTIONS,
    MODULES,
    PACKAGES,
    PROGRAMS,
    ROOT,
    TEST_MODULES,
    module_name,
    parse,
    sources,
    texts,
)

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_CLASS_LINES = 250
MAX_ATTRIBUTES = 12
MAX_POSITIONAL = 5
"""A call with more arguments than this names them."""
NO_LIMIT = 1_000


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def test_files_are_short() -> None:
    lines = {module_name(path): len(path.read_text().splitlines()) for path in sources(*PACKAGES, *PROGRAMS)}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    lines = {
        f"{module_name(path)}:{node.name}": lines_of(node)
        for path in sources(*PACKAGES, *PROGRAMS)
        for node in ast.walk(parse(path))
        if isinstance(node, FUNCTIONS)
    }
    assert {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES} == {}


# Classes


def classes_of(*folders: str) -> dict[str, ast.ClassDef]:
    return {
        f"{module_name(path)}:{node.name}": node
        for path in sources(*folders)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef)
    }


def fields(cls: ast.ClassDef) -> set[str]:
    """Return the names that the body of a class declares or assigns."""
    annotated = [s.target for s in cls.body if isinstance(s, ast.AnnAssign)]
    assigned = [target for s in cls.body if isinstance(s, ast.Assign) for target in s.targets]
    return {target.id for target in (*annotated, *assigned) if isinstance(target, ast.Name)}


def methods(cls: ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (statement for statement in cls.body if isinstance(statement, FUNCTIONS))


def assigned_in(method: ast.AST) -> set[str]:
    """Return the attributes of self that a method binds, also by `for`, `with` and unpacking."""
    return {
        node.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def born_in_constructor(cls: ast.ClassDef) -> set[str]:
    constructors = [method for method in methods(cls) if method.name in ("__init__", "__post_init__")]
    return {name for method in constructors for name in assigned_in(method)}


def is_mutable_dataclass(cls: ast.ClassDef) -> bool:
    decorators = [ast.unparse(decorator) for decorator in cls.decorator_list]
    return any("dataclass" in text and "frozen=True" not in text for text in decorators)


def state_of(cls: ast.ClassDef) -> set[str]:
    """Return the attributes that make up the state of an object.

    Fields of a mutable dataclass count like assignments in __init__. Fields of a frozen dataclass or of a
    pydantic model do not. Such an object is a record: the configuration, a manifest, a report. Its fields
    are a schema and never change, so a long schema is no burden to a reader.
    """
    return born_in_constructor(cls) | (fields(cls) if is_mutable_dataclass(cls) else set())


def born_late(cls: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Return the attributes that only methods other than the constructor assign."""
    names = {ast.unparse(base) for base in cls.bases}
    bases = [base for name, base in classes.items() if name.partition(":")[2] in names]
    early = {name for each in (cls, *bases) for name in born_in_constructor(each) | fields(each)}
    return {name for method in methods(cls) for name in assigned_in(method)} - early


def test_classes_are_short() -> None:
    lines = {name: lines_of(cls) for name, cls in classes_of(*PACKAGES, *PROGRAMS).items()}
    assert {name: count for name, count in lines.items() if count > MAX_CLASS_LINES} == {}


def test_objects_hold_few_attributes() -> None:
    state = {name: state_of(cls) for name, cls in classes_of(*PACKAGES, *PROGRAMS).items()}
    assert {name: sorted(names) for name, names in state.items() if len(names) > MAX_ATTRIBUTES} == {}


def test_attributes_are_born_in_the_constructor() -> None:
    """An attribute that appears later belongs to an object with a shorter life, hence to a second class."""
    classes = classes_of(*PACKAGES, *PROGRAMS)
    late = {name: sorted(born_late(cls, classes)) for name, cls in classes.items()}
    assert {name: names for name, names in late.items() if names} == {}


def test_the_state_of_a_class_is_recognised() -> None:
    source = """
class Base:
    limit: int
    def __init__(self):
        self.a, (self.b, *self.c) = 1, (2, 3)

class Derived(Base):
    def work(self):
        self.a += 1
        self.limit = 2
        self.other.x = 1
        with open("f") as self.file:
            for self.d in range(3):
                self.e: int = (found := 3)

@dataclass(slots=True)
class Mutable:
    x: int
    def __post_init__(self):
        self.y = self.x

@dataclass(frozen=True)
class Record:
    x: int
"""
    classes = {f"m:{node.name}": node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    assert {name: state_of(cls) for name, cls in classes.items()} == {
        "m:Base": {"a", "b", "c"},
        "m:Derived": set(),
        "m:Mutable": {"x", "y"},
        "m:Record": set(),
    }
    assert {name: born_late(cls, classes) for name, cls in classes.items()} == {
        "m:Base": set(),
        "m:Derived": {"file", "d", "e"},
        "m:Mutable": set(),
        "m:Record": set(),
    }


# Calls


@cache
def named_parameters() -> dict[str, int]:
    """Return how many positional parameters each class and function of this project takes, by dotted name."""
    counts = {}
    for module, path in (MODULES | TEST_MODULES).items():
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef):
                counts[f"{module}.{node.name}"] = NO_LIMIT
            elif isinstance(node, FUNCTIONS):
                counts[f"{module}.{node.name}"] = len(node.args.posonlyargs) + len(node.args.args)
    return counts


def our_names(path: Path) -> dict[str, str]:
    """Return what the names in a file stand for, where that is a class or function of this project."""
    names = {}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for statement in parse(path).body:
        if isinstance(statement, (ast.ClassDef, *FUNCTIONS)):
            names[statement.name] = f"{module_name(path)}.{statement.name}"
    return names


def definition_of(name: str) -> str:
    """Return the dotted name where a class or function is defined, given a name that a package re-exports."""
    module, _, short = name.rpartition(".")
    if name in named_parameters() or module not in MODULES:
        return name
    return our_names(MODULES[module]).get(short, name)


def calls_by_position(path: Path) -> Iterator[str]:
    """Yield calls to our classes and functions that pass more than five named parameters by position.

    Arguments that `*args` collects have no names. Methods are not recognised, because the class of their
    object is unknown.
    """
    names = our_names(path)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and len(node.args) > MAX_POSITIONAL:
            first, *rest = ast.unparse(node.func).split(".")
            target = definition_of(".".join([names.get(first, ""), *rest]))
            if named_parameters().get(target, 0) > MAX_POSITIONAL:
                yield f"{path}:{node.lineno} {target}"


def test_calls_by_position_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from tests.architecture import source\n"
        "from dit_scale_pipeline.inputs import Entry\n"
        "from tests.support.ranks.processes import start\n"
        "Entry(1, 2, 3, 4, 5, 6)\n"
        "Entry(1, 2, 3, 4, 5, key=6)\n"
        "source.Import(1, 2, 3, 4, 5, 6)\n"
        "start(2, print, 3, 4, 5, 6)\n"
        "path.permute(1, 2, 3, 4, 5, 6)\n"
    )
    assert [call.partition(":")[2] for call in calls_by_position(path)] == [
        "4 dit_scale_pipeline.inputs.base.Entry",
        "6 tests.architecture.source.Import",
    ]


def test_calls_with_many_arguments_name_them() -> None:
    paths = sources(*PACKAGES, *PROGRAMS, "tests")
    assert [call for path in paths for call in calls_by_position(path)] == []


# Text


def test_no_error_is_swallowed() -> None:
    """No handler catches everything, and none does nothing: contextlib.suppress shows the intention."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(*PACKAGES, *PROGRAMS, "tests")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(line, ast.Pass) for line in node.body))
    ]
    assert found == []


def test_every_file_has_a_docstring() -> None:
    written = [path for path in sources(*PACKAGES, *PROGRAMS, "tests") if path.stat().st_size]
    assert [str(path) for path in written if not ast.get_docstring(parse(path))] == []


def test_docstrings_are_full_thoughts() -> None:
    """A docstring that starts with "Of" or a possessive needs its context to be understood."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value.value[:40]}"
        for path in sources(*PACKAGES, *PROGRAMS, "tests")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and re.match(r"(Of|Its|Their)\b", node.value.value)
    ]
    assert found == []


def test_text_is_ascii() -> None:
    assert [str(path.relative_to(ROOT)) for path in texts() if not path.read_bytes().isascii()] == []


def test_no_text_has_conflict_markers_of_a_merge() -> None:
    marker = re.compile(rb"^(<<<<<<<|>>>>>>>) ", re.MULTILINE)
    assert [str(path.relative_to(ROOT)) for path in texts() if marker.search(path.read_bytes())] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_has_its_command_in_the_header(path: Path) -> None:
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header, "expected a comment at the top"
    assert f"configs/{path.name}" in header[0]
    assert re.search(r"dit-scale |dit_scale\.cli |encode_latents\.py", header[0])
