"""The laws of the test folders and of the scripts around the packages."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from tests.architecture.source import (
    FUNCTIONS,
    MODULES,
    PROGRAMS,
    ROOT,
    TEST_MODULES,
    imports_of,
    parse,
    sources,
    within,
)

OURS = MODULES | TEST_MODULES
FOLDERS = sorted({path.relative_to(ROOT).parts[1] for path in TEST_MODULES.values()} - {"__init__.py"})


@pytest.mark.parametrize("folder", [name for name in FOLDERS if not name.endswith(".py")])
def test_a_test_folder_imports_only_support_and_itself(folder: str) -> None:
    allowed = ("tests.support",) if folder == "support" else ("tests.support", f"tests.{folder}")
    found = [
        f"{path.relative_to(ROOT)}:{entry.line} imports {entry.name}"
        for path in sources(f"tests/{folder}")
        for entry in imports_of(path)
        if within(entry.name, ("tests",)) and not within(entry.name, allowed) and entry.name != "tests"
    ]
    assert found == []


@cache
def top_level_names(path: Path) -> frozenset[str]:
    """Return the names that a module defines or imports outside its functions and classes."""
    return frozenset(_names(parse(path)))


def _names(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, *FUNCTIONS)):
            yield child.name
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in child.names)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        else:
            yield from _names(child)


def test_scripts_and_tests_import_what_exists() -> None:
    """Check the imports that mypy does not see. Most of these scripts run too rarely to reveal a typo."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {node.module}.{alias.name}"
        for path in sources(*PROGRAMS, "data_pipeline", "tests")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom)
        and within(str(node.module), ("dit_scale", "dit_scale_pipeline", "tests"))
        for alias in node.names
        if f"{node.module}.{alias.name}" not in OURS
        and (node.module not in OURS or alias.name not in top_level_names(OURS[str(node.module)]))
    ]
    assert found == []


def test_pytest_enters_every_test_folder(request: pytest.FixtureRequest) -> None:
    left_out = request.config.getini("norecursedirs")
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {"dist", "pipeline", "unit"} <= folders
    assert not [name for name in folders if any(fnmatch(name, pattern) for pattern in left_out)]
