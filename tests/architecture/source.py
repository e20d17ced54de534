"""The source code as the laws see it: parsed, never imported."""

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PIPELINE = "data_pipeline/dit_scale_pipeline"
PACKAGES = ("dit_scale", PIPELINE)
PROGRAMS = ("benchmarks", "cluster", "demo")
FOREIGN_SUBMODULES = ("torch.utils.tensorboard",)
"""Modules of other libraries that a law names, and that `from package import module` can import."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Import:
    """One imported module; `from a.b import c` imports a.b, and also a.b.c if that is a module."""

    name: str
    line: int
    lazy: bool
    """Whether the import runs later than the module, or never: in a function or under TYPE_CHECKING."""
    typing: bool = False
    """Whether only the type checker sees the import."""


def sources(*folders: str) -> list[Path]:
    """Return all Python files below these folders of the project."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """Return the dotted name of a file: dit_scale.models.dit."""
    root = ROOT / "data_pipeline" if path.is_relative_to(ROOT / PIPELINE) else ROOT
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(name: str) -> str:
    """Return the part of dit_scale that a module belongs to: `models` for dit_scale.models.dit."""
    return name.split(".")[1] if "." in name else ""


MODULES = {module_name(path): path for path in sources(*PACKAGES)}
TEST_MODULES = {module_name(path): path for path in sources("tests")}


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text())


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Return the imports of a file, in order."""
    return tuple(_imports(parse(path), lazy=False, typing=False))


def _imports(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import of {child.module} in line {child.lineno}"
            yield Import(str(child.module), child.lineno, lazy, typing)
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                if name in MODULES or name in TEST_MODULES or name in FOREIGN_SUBMODULES:
                    yield Import(name, child.lineno, lazy, typing)
        else:
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            now_lazy = lazy or typing_only or isinstance(child, FUNCTIONS)
            yield from _imports(child, now_lazy, typing or typing_only)


def within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of these packages or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def texts() -> Iterator[Path]:
    """Yield the project's text files, without hidden folders, build outputs and runs."""
    for folder, folders, names in os.walk(ROOT):
        hidden = [name for name in folders if name.startswith((".", "__")) or name.endswith(".egg-info")]
        for name in {*hidden, "runs", "build", "dist"} & set(folders):
            if name != "dist" or Path(folder) == ROOT:
                folders.remove(name)
        for name in names:
            if name.endswith((".py", ".md", ".yaml", ".toml", ".sh", ".txt", ".cfg")) or name == "Makefile":
                yield Path(folder, name)
