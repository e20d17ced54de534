"""The laws of the architecture: who may import whom, and through which door a foreign library enters.

An import inside a function or under TYPE_CHECKING counts like any other, unless a law says otherwise.
"""

import re
import tomllib
from pathlib import Path

import pytest

from tests.architecture.source import (
    FOREIGN_SUBMODULES,
    MODULES,
    PACKAGES,
    PROGRAMS,
    ROOT,
    Import,
    imports_of,
    part_of,
    sources,
    within,
)

SCRIPTS = ("data_pipeline/encode_latents.py",)

LAYERS = (
    "errors",
    "signals",
    "lines",
    "journal",
    "ledger",
    "heartbeat",
    "sealed",
    "trees",
    "image_progress",
    "recipes",
    "paths",
    "configfile",
    "choices",
    "sections",
    "config",
    "keys",
    "storage",
    "host_memory",
    "kernels",
    "rng",
    "dist",
    "models",
    "diffusion",
    "data",
    "vae_files",
    "vae",
    "weights",
    "sampling",
    "evaluate",
    "checkpoint",
    "telemetry",
    "elastic",
    "train",
    "inference",
    "report",
    "monitoring",
    "forecast",
    "scaling",
    "cli",
)
"""The parts of dit_scale, lowest layer first. A part imports only itself and the parts listed before it."""

STRANGERS = (("models", "diffusion", "data"), ("inference", "report", "forecast"))
"""Groups of parts that must not import each other, in either direction."""

DOORS = {
    "deepspeed": ("dit_scale.train.zero", "dit_scale.train.optim"),
    "apex": ("dit_scale.models.attention", "dit_scale.train.optim"),
    "flash_attn": ("dit_scale.models.attention", "dit_scale.train.optim"),
    "argcomplete": ("dit_scale.cli.completion",),
    "boto3": ("dit_scale.storage.s3",),
    "botocore": ("dit_scale.storage.s3",),
    "diffusers": ("dit_scale.vae",),
    "huggingface_hub": ("dit_scale.vae_files",),
    "jinja2": ("dit_scale.report.page.document",),
    "matplotlib": ("dit_scale.scaling.canvas",),
    "prometheus_client": ("dit_scale.monitoring.exporter", "dit_scale.monitoring.families"),
    "psutil": ("dit_scale.elastic.node.processes", "dit_scale_pipeline.ray_start"),
    "pyarrow": ("dit_scale_pipeline.inputs.parquet",),
    "ray": tuple(
        f"dit_scale_pipeline.{name}" for name in ("encoder_pool", "flow", "ray_cluster", "ray_start", "tasks")
    ),
    "triton": ("dit_scale.kernels.adamw", "dit_scale.kernels.philox"),
    "transformers": ("dit_scale.evaluate.networks.dinov2",),
    "trackio": ("dit_scale.telemetry.sinks.trackio_sink",),
    "wandb": ("dit_scale.telemetry.sinks.wandb_sink",),
    "tensorboard": ("dit_scale.telemetry.sinks.tensorboard_sink",),
    "torch.utils.tensorboard": ("dit_scale.telemetry.sinks.tensorboard_sink",),
}
"""Foreign library => the only modules that import it."""

LIGHT = ("psutil",)
"""Libraries that load quickly: their doors import them at the top."""

DECORATORS = ("triton",)
"""Libraries that decorate functions: their doors import them at the top, and load when they are needed."""

WITHOUT_TORCH = (
    "dit_scale.errors",
    "dit_scale.cli",
    "dit_scale.choices",
    "dit_scale.config",
    "dit_scale.sections",
    "dit_scale.configfile",
    "dit_scale.paths",
    "dit_scale.keys",
    "dit_scale.storage",
    "dit_scale.data.download",
    "dit_scale.data.held_out",
    "dit_scale.data.order",
    "dit_scale.data.pixels",
    "dit_scale.data.batch_plan",
    "dit_scale.data.quarantine",
    "dit_scale.data.shards",
    "dit_scale.data.statistics",
    "dit_scale.data.verify",
    "dit_scale.models.zoo",
    "dit_scale.sampling.settings",
    "dit_scale.vae_files",
    "dit_scale.checkpoint.writer",
    "dit_scale.recipes",
    "dit_scale.report.page.document",
    "dit_scale.report.status",
    "dit_scale_pipeline.decoder",
    "dit_scale_pipeline.inputs",
    "dit_scale_pipeline.shards_writer",
)
"""Modules that start quickly or run without torch: neither they nor what they import may import torch.

An import for the type checker is allowed.
"""


def offences(path: Path, forbidden: tuple[str, ...]) -> list[str]:
    """Return where a file imports one of the forbidden packages."""
    return [
        f"{path.relative_to(ROOT)}:{entry.line} imports {entry.name}"
        for entry in imports_of(path)
        if within(entry.name, forbidden)
    ]


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
def test_neighbours_do_not_import_each_other(part: str, group: tuple[str, ...]) -> None:
    others = tuple(f"dit_scale.{other}" for other in group if other != part)
    assert [o for path in sources(f"dit_scale/{part}") for o in offences(path, others)] == []


def test_no_module_imports_the_loop_or_the_command_line() -> None:
    found = [
        (name, entry.name, entry.lazy)
        for name, path in MODULES.items()
        for entry in imports_of(path)
        if within(entry.name, ("dit_scale.train.loop", "dit_scale.cli"))
        and not (within(name, ("dit_scale.cli",)) and within(entry.name, ("dit_scale.cli",)))
    ]
    assert found == [("dit_scale.cli.train", "dit_scale.train.loop", True)]


def test_the_library_does_not_import_its_programs() -> None:
    programs = (*PROGRAMS, "tests")
    assert [o for path in sources(*PACKAGES) for o in offences(path, programs)] == []


def test_only_two_commands_import_the_pipeline() -> None:
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


def test_the_pipelines_folder_holds_short_scripts() -> None:
    beside = {str(path.relative_to(ROOT)): path for path in (ROOT / "data_pipeline").glob("*.py")}
    assert set(beside) == set(SCRIPTS)
    assert {name for name, path in beside.items() if len(path.read_text().splitlines()) > 30} == set()


def test_imports_have_no_cycle() -> None:
    # A module that imports its sibling from their package also imports the package; that alone is no cycle.
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


@pytest.mark.parametrize("library", [name for name in DOORS if name not in LIGHT + DECORATORS])
def test_heavy_libraries_load_when_they_are_needed(library: str) -> None:
    found = [
        f"{name}:{entry.line}"
        for name, path in MODULES.items()
        for entry in imports_of(path)
        if within(entry.name, (library,)) and not entry.lazy
    ]
    assert found == []


@pytest.mark.parametrize("library", DECORATORS)
def test_doors_of_decorators_load_when_they_are_needed(library: str) -> None:
    found = [
        f"{name}:{entry.line}"
        for name, path in MODULES.items()
        for entry in imports_of(path)
        if within(entry.name, DOORS[library]) and not entry.lazy and name not in DOORS[library]
    ]
    assert found == []


def test_every_runtime_dependency_is_imported() -> None:
    """Packages that only tests and benchmarks use belong to the extra `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", text)[0] for text in project["dependencies"]}  # type: ignore[index]
    imported = {entry.name.partition(".")[0] for path in MODULES.values() for entry in imports_of(path)}
    modules = {"pillow": "PIL", "pyyaml": "yaml"}
    assert {name for name in names if modules.get(name, name.replace("-", "_")) not in imported} == set()


def test_no_module_changes_the_import_path() -> None:
    scripts = [*(ROOT / name for name in SCRIPTS), *sources("benchmarks", "demo")]
    found = [path for path in (*MODULES.values(), *scripts) if "sys.path" in path.read_text()]
    assert found == []


def test_modules_are_imported_by_name() -> None:
    """No law sees a module name that is built at run time."""
    users = {
        name
        for name, path in MODULES.items()
        if re.search(r"\b(import_module|__import__)\b", path.read_text())
    }
    assert users == set()


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
    found = [
        f"{module}:{entry.line} imports {entry.name}"
        for module in sorted(reached)
        for entry in imports_of(MODULES[module])
        if within(entry.name, ("torch",)) and not entry.typing
    ]
    assert found == []


def test_submodules_with_a_door_are_recognised() -> None:
    assert {library for library in DOORS if "." in library} == set(FOREIGN_SUBMODULES)


def test_imports_are_found_in_every_position(tmp_path: Path) -> None:
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
        Import("ray", 4, lazy=True, typing=True),
        Import("deepspeed.ops", 8, lazy=True),
        Import("torch.utils", 10, lazy=True),
        Import("torch.utils.tensorboard", 10, lazy=True),
    )
    assert within("torch.nn", ("torch",))
    assert not within("torchvision", ("torch",))
