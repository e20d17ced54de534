"""The laws of the architecture, read from the source without running it.

Imports inside functions and under TYPE_CHECKING count like all others, unless a law says otherwise.
"""

import ast
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIPELINE = "data_pipeline/dit_scale_pipeline"
PACKAGES = ("dit_scale", PIPELINE)
SCRIPTS = ("data_pipeline/encode_latents.py",)
PROGRAMS = ("benchmarks", "cluster", "demo")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

LAYERS = (
    "errors",
    "signals",
    "lines",
    "journal",
    "ledger",
    "heartbeat",
    "sealed",
    "recipes",
    "paths",
    "configfile",
    "config",
    "keys",
    "storage",
    "rng",
    "dist",
    "models",
    "diffusion",
    "data",
    "vae_files",
    "vae",
    "weights",
    "checkpoint",
    "telemetry",
    "elastic",
    "train",
    "inference",
    "report",
    "forecast",
    "cli",
)
"""The parts of dit_scale, lowest first: a part imports only from itself and from the parts above it here."""

STRANGERS = (("models", "diffusion", "data"), ("inference", "report", "forecast"))
"""Parts of neighbouring layers that do not know each other."""

DOORS = {
    "deepspeed": ("dit_scale.train.engine", "dit_scale.train.optim"),
    "apex": ("dit_scale.models.attention", "dit_scale.train.optim"),
    "flash_attn": ("dit_scale.models.attention", "dit_scale.train.optim"),
    "boto3": ("dit_scale.storage.s3",),
    "botocore": ("dit_scale.storage.s3",),
    "diffusers": ("dit_scale.vae", "dit_scale.weights"),
    "huggingface_hub": ("dit_scale.vae_files",),
    "psutil": ("dit_scale.elastic.node.processes", "dit_scale_pipeline.ray_start"),
    "pyarrow": ("dit_scale_pipeline.inputs.parquet",),
    "ray": ("dit_scale_pipeline.flow", "dit_scale_pipeline.ray_cluster", "dit_scale_pipeline.ray_start"),
    "wandb": ("dit_scale.telemetry.sinks",),
    "tensorboard": ("dit_scale.telemetry.sinks",),
    "torch.utils.tensorboard": ("dit_scale.telemetry.sinks",),
}
"""Foreign library => the only modules that import it."""

LIGHT = ("psutil",)
"""Libraries that load quickly: their doors import them at the top."""

WITHOUT_TORCH = (
    "dit_scale.errors",
    "dit_scale.cli",
    "dit_scale.config",
    "dit_scale.configfile",
    "dit_scale.paths",
    "dit_scale.keys",
    "dit_scale.storage",
    "dit_scale.data.download",
    "dit_scale.data.order",
    "dit_scale.data.batch_plan",
    "dit_scale.data.quarantine",
    "dit_scale.data.shards",
    "dit_scale.data.statistics",
    "dit_scale.data.verify",
    "dit_scale.models.zoo",
    "dit_scale.vae_files",
    "dit_scale.checkpoint.writer",
    "dit_scale.recipes",
    "dit_scale_pipeline.decoder",
    "dit_scale_pipeline.images",
    "dit_scale_pipeline.inputs",
    "dit_scale_pipeline.shards_writer",
)
"""Modules that must load quickly, or where there is no torch: neither they nor what they import has it."""


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Import:
    """A module that another asks for; `from a.b import c` asks for a.b, and for a.b.c if that is a module."""

    name: str
    line: int
    lazy: bool
    """Inside a function, or for the type checker alone: not run when the module is imported."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    root = ROOT / "data_pipeline" if path.is_relative_to(ROOT / PIPELINE) else ROOT
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources(*PACKAGES)}


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    return tuple(_walk(ast.parse(path.read_text()), lazy=False))


def _walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{child.module}, line {child.lineno}: imports are absolute here"
            yield Import(str(child.module), child.lineno, lazy)
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                if name in MODULES or name in DOORS:
                    yield Import(name, child.lineno, lazy)
        else:
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _walk(child, lazy or typing_only or isinstance(child, FUNCTIONS))


def within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of these packages, or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offences(path: Path, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{entry.line} imports {entry.name}"
        for entry in imports_of(path)
        if within(entry.name, forbidden)
    ]


def part_of(name: str) -> str:
    """The part of dit_scale that a module belongs to: `models` of dit_scale.models.dit."""
    return name.split(".")[1] if "." in name else ""


# Who may import whom


def test_every_part_has_a_layer_and_every_layer_a_part() -> None:
    assert {part_of(name) for name in MODULES if within(name, ("dit_scale",))} - {""} == set(LAYERS)


@pytest.mark.parametrize("part", LAYERS)
def test_nothing_is_imported_from_a_higher_layer(part: str) -> None:
    higher = tuple(f"dit_scale.{later}" for later in LAYERS[LAYERS.index(part) + 1 :])
    found = [
        offence
        for name, path in MODULES.items()
        if within(name, (f"dit_scale.{part}",))
        for offence in offences(path, higher)
    ]
    assert found == []


@pytest.mark.parametrize(("part", "group"), [(part, group) for group in STRANGERS for part in group])
def test_neighbours_do_not_know_each_other(part: str, group: tuple[str, ...]) -> None:
    others = tuple(f"dit_scale.{other}" for other in group if other != part)
    assert [o for path in sources(f"dit_scale/{part}") for o in offences(path, others)] == []


def test_nobody_imports_the_loop_or_the_command_line() -> None:
    found = [
        (name, entry.name, entry.lazy)
        for name, path in MODULES.items()
        for entry in imports_of(path)
        if within(entry.name, ("dit_scale.train.loop", "dit_scale.cli"))
        and not (within(name, ("dit_scale.cli",)) and within(entry.name, ("dit_scale.cli",)))
    ]
    assert found == [("dit_scale.cli.train", "dit_scale.train.loop", True)]


def test_the_library_does_not_know_its_programs() -> None:
    programs = (*PROGRAMS, "tests")
    assert [o for path in sources(*PACKAGES) for o in offences(path, programs)] == []


def test_only_the_commands_of_latent_data_sets_know_the_pipeline() -> None:
    found = [
        (name, entry.name, entry.lazy)
        for name, path in MODULES.items()
        if within(name, ("dit_scale",))
        for entry in imports_of(path)
        if within(entry.name, ("dit_scale_pipeline",))
    ]
    assert set(found) == {
        ("dit_scale.cli.encode", "dit_scale_pipeline.job", True),
        ("dit_scale.cli.latents", "dit_scale_pipeline.compare", True),
        ("dit_scale.cli.latents", "dit_scale_pipeline.inputs.names", True),
    }


def test_the_folder_of_the_pipeline_holds_short_scripts_beside_it() -> None:
    beside = {str(path.relative_to(ROOT)): path for path in (ROOT / "data_pipeline").glob("*.py")}
    assert set(beside) == set(SCRIPTS)
    assert {name for name, path in beside.items() if len(path.read_text().splitlines()) > 30} == set()


def test_imports_have_no_cycle() -> None:
    # `from package import module` in a package's own file asks for the package too; that alone is no cycle.
    graph = {
        name: ({entry.name for entry in imports_of(path)} & set(MODULES)) - {name}
        for name, path in MODULES.items()
    }
    while leaves := [name for name, needs in graph.items() if not needs & set(graph)]:
        for name in leaves:
            del graph[name]
    assert graph == {}


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library: str) -> None:
    found = [
        offence
        for name, path in MODULES.items()
        if name not in DOORS[library]
        for offence in offences(path, (library,))
    ]
    assert found == []


@pytest.mark.parametrize("library", [name for name in DOORS if name not in LIGHT])
def test_heavy_libraries_load_when_they_are_needed(library: str) -> None:
    found = [
        f"{name}:{entry.line}"
        for name, path in MODULES.items()
        for entry in imports_of(path)
        if within(entry.name, (library,)) and not entry.lazy
    ]
    assert found == []


def test_every_runtime_dependency_is_imported() -> None:
    """What only tests and benchmarks use belongs to the extra `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", text)[0] for text in project["dependencies"]}  # type: ignore[index]
    imported = {entry.name.partition(".")[0] for path in MODULES.values() for entry in imports_of(path)}
    modules = {"pillow": "PIL", "pyyaml": "yaml"}
    assert {name for name in names if modules.get(name, name.replace("-", "_")) not in imported} == set()


def test_no_module_changes_the_import_path() -> None:
    scripts = [ROOT / name for name in SCRIPTS]
    found = [path for path in (*MODULES.values(), *scripts) if "sys.path" in path.read_text()]
    assert found == []


def test_modules_are_imported_by_name() -> None:
    """A name put together at run time would pass by every law; attention backends are chosen so."""
    users = {
        name
        for name, path in MODULES.items()
        if re.search(r"\b(import_module|__import__)\b", path.read_text())
    }
    assert users == {"dit_scale.models.attention"}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_without_torch(name: str) -> None:
    reached: set[str] = set()
    left = {name}
    while left:
        module = left.pop()
        reached.add(module)
        needed = {entry.name for entry in imports_of(MODULES[module]) if not entry.lazy}
        packages = {parent for parent in MODULES if module.startswith(f"{parent}.")}
        left |= ((needed & set(MODULES)) | packages) - reached
    assert [o for module in sorted(reached) for o in offences(MODULES[module], ("torch",))] == []


def test_imports_are_seen_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import torch.nn as nn\n"
        "from dit_scale.models import dit, zoo\n"
        "if TYPE_CHECKING:\n"
        "    from ray import ObjectRef\n"
        "class A:\n"
        "    async def f(self):\n"
        "        try:\n"
        "            import deepspeed.ops\n"
        "        except ImportError:\n"
        "            from torch.utils import tensorboard\n"
    )
    assert imports_of(path) == (
        Import("torch.nn", 1, lazy=False),
        Import("dit_scale.models", 2, lazy=False),
        Import("dit_scale.models.dit", 2, lazy=False),
        Import("dit_scale.models.zoo", 2, lazy=False),
        Import("ray", 4, lazy=True),
        Import("deepspeed.ops", 8, lazy=True),
        Import("torch.utils", 10, lazy=True),
        Import("torch.utils.tensorboard", 10, lazy=True),
    )
    assert within("torch.nn", ("torch",))
    assert not within("torchvision", ("torch",))


# How files look


def test_files_are_short() -> None:
    lines = {module_name(path): len(path.read_text().splitlines()) for path in sources(*PACKAGES, *PROGRAMS)}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    lines = {
        f"{module_name(path)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in sources(*PACKAGES, *PROGRAMS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, FUNCTIONS)
    }
    assert {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES} == {}


def test_no_error_is_swallowed() -> None:
    """No `except:` that catches all, and none that does nothing: contextlib.suppress says that by name."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(*PACKAGES, *PROGRAMS, "tests")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(line, ast.Pass) for line in node.body))
    ]
    assert found == []


def test_every_file_says_what_it_is() -> None:
    written = [path for path in sources(*PACKAGES, *PROGRAMS, "tests") if path.stat().st_size]
    assert [str(path) for path in written if not ast.get_docstring(ast.parse(path.read_text()))] == []


def texts() -> Iterator[Path]:
    """All files of the project that people read; hidden folders and runs are not of it."""
    for folder, folders, names in os.walk(ROOT):
        hidden = [name for name in folders if name.startswith((".", "__")) or name.endswith(".egg-info")]
        for name in {*hidden, "runs", "build", "dist"} & set(folders):
            if name != "dist" or Path(folder) == ROOT:
                folders.remove(name)
        for name in names:
            if name.endswith((".py", ".md", ".yaml", ".toml", ".sh", ".txt", ".cfg")) or name == "Makefile":
                yield Path(folder, name)


def test_text_is_ascii() -> None:
    assert [str(path.relative_to(ROOT)) for path in texts() if not path.read_bytes().isascii()] == []


# Recipes


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_has_its_command_in_the_header(path: Path) -> None:
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header, "expected a comment at the top"
    assert f"configs/{path.name}" in header[0]
    assert re.search(r"dit-scale |dit_scale\.cli |encode_latents\.py", header[0])


def test_pytest_enters_every_folder_of_tests(request: pytest.FixtureRequest) -> None:
    left_out = request.config.getini("norecursedirs")
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {"dist", "pipeline", "unit"} <= folders
    assert not [name for name in folders if any(fnmatch(name, pattern) for pattern in left_out)]
