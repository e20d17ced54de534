"""The built wheel, installed without the rest of the project: a small run from images to weights."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.bare import bare_python
from tests.support.encoding import ROOT, clean_environment, write_images
from tests.support.tiny_vae import save_tiny_vae

pytestmark = pytest.mark.pipeline

SOURCES = ("pyproject.toml", "README.md", "dit_scale", "data_pipeline", "configs")
"""Sources of the wheel."""


class Site:
    """A folder with only the installed wheel, and a separate working folder."""

    def __init__(self, top: Path) -> None:
        self.packages, self.work = top / "site", top / "work"
        self.work.mkdir()
        self.python = bare_python(top / "python")
        self._environment = clean_environment(DS_ACCELERATOR="cpu", PYTHONPATH=str(self.packages))
        self._environment.pop("PIP_CONSTRAINT", None)  # a path below another folder

    def run(self, *words: object) -> str:
        """Run a command and return its output; on failure, show all of it."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.work,
            env=self._environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        assert done.returncode == 0, f"{words} exited with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def dit_scale(self, *words: object) -> str:
        return self.run(self.packages / "bin/dit-scale", *words)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    top = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:  # built in a copy, because setuptools writes beside its sources
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, top / "sources" / name, symlinks=True, ignore=ignored)
        else:
            (top / "sources").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, top / "sources")
    site = Site(top)
    pip = (site.python, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-cache-dir")
    offline = ("--no-deps", "--no-index")
    site.run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", top, top / "sources")
    (wheel,) = top.glob("*.whl")
    site.run(*pip, "install", *offline, "--target", site.packages, wheel)
    return site


def test_it_brings_two_names_and_the_recipes(site: Site) -> None:
    installed = {path.name for path in site.packages.iterdir() if path.suffix != ".dist-info"}
    assert installed == {"bin", "dit_scale", "dit_scale_pipeline"}
    script = "import dit_scale, dit_scale_pipeline.job as job; print(dit_scale.__file__, job.__file__)"
    found = site.run(site.python, "-c", script).split()
    assert all(Path(path).is_relative_to(site.packages) for path in found)
    said = site.dit_scale()
    assert all(path.stem in said for path in (ROOT / "configs").glob("*.yaml"))


def test_a_recipe_by_its_name(site: Site) -> None:
    printed = site.dit_scale("train", "dit_xl2_256", "--dry-run", "--world", 8, "seed=5")
    recipe = yaml.safe_load((ROOT / "configs/dit_xl2_256.yaml").read_text())
    assert f"steps: {recipe['steps']}\n" in printed
    assert "seed: 5\n" in printed


def test_the_life_of_a_run(site: Site) -> None:
    """With the installed commands: Ray encodes, one process trains, samples and exports."""
    write_images(site.work / "images", 12, classes=2)
    vae = save_tiny_vae(site.work / "vae")
    sizes = ("image_size=32", "shard_samples=8", "vae_batch=4", "encoders=1", "cpus_per_encoder=0.5")
    site.dit_scale("encode", *sizes, "source=images", "output=latents", f"vae={vae}")
    info = json.loads(site.dit_scale("latents", "info", "latents", "--json"))
    assert (info["samples"], info["class_names"]) == (12, ["n0", "n1"])

    model = "model={name: DiT-Ti/2, image_size: 32, num_classes: 2}"
    settings = ("run=run", "data.url=latents", f"data.vae={vae}", "steps=3", "global_batch=4")
    site.dit_scale("train", "demo", model, *settings, "engine.precision=fp32", "log.every_steps=1")
    rows = [json.loads(line) for line in (site.work / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]

    site.dit_scale("sample", "run", "--images", 2, "--steps", 2, "--out", "drawn")
    assert np.load(site.work / "drawn/samples.npz")["arr_0"].shape == (2, 32, 32, 3)
    site.dit_scale("checkpoint", "export", "run", "weights.safetensors")
    assert (site.work / "weights.safetensors").stat().st_size > 0
