"""`dit-scale export`: three forms with the same bits, and what each of them says about the model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dit_scale import cli
from dit_scale.cli.export import CHANGED_IN_DIFFUSERS
from dit_scale.config import TrainConfig
from dit_scale.errors import ConfigError, WeightsError
from dit_scale.inference.export import export, export_pt
from dit_scale.inference.sources import WeightsSource, build_model, open_source
from dit_scale.train.changes import identity
from tests.support.tiny_run import random_weights, tiny_config, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_vae: str) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, tiny_vae)
    return folder


@pytest.fixture(scope="module")
def thousand(run: Path) -> WeightsSource:
    """The run's weights, as if it had 1000 diffusion steps."""
    from dataclasses import replace

    return replace(open_source(str(run)), timesteps=1000)


def assert_same(one: WeightsSource, other: WeightsSource) -> None:
    assert one.state.keys() == other.state.keys()
    assert all(torch.equal(one.state[name], tensor) for name, tensor in other.state.items())
    assert {tensor.dtype for tensor in one.state.values()} == {torch.float32}


@pytest.mark.parametrize(("form", "name"), [("safetensors", "ema.safetensors"), ("diffusers", "pipeline")])
@pytest.mark.parametrize("profile", ["first", "second"])
def test_a_run_exports_the_bits_of_any_profile(
    form: str, name: str, profile: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    assert cli.main(["export", str(run), "--to", form, "--out", str(out), "--ema", profile]) == 0
    printed = capsys.readouterr()
    source, back = open_source(str(run), profile), open_source(str(out))
    assert printed.out == f"{source.description} -> {out}\n"
    assert_same(back, source)
    assert back.timesteps == source.timesteps == 100
    assert back.vae_sha256 == source.vae_sha256
    assert "the names of the classes are unknown" in printed.err  # the run's data set does not exist
    assert (CHANGED_IN_DIFFUSERS in printed.err) == (form == "diffusers")
    assert back.model.model_copy(update={"timestep_embedding": "paper"}) == source.model
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_published_layout(thousand: WeightsSource, tmp_path: Path) -> None:
    """A flat dict of fp32 tensors, and the same bytes whatever the file is called."""
    for name in ("one.pt", "two.pt"):
        export_pt(thousand, tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    content = torch.load(tmp_path / "one.pt", weights_only=True)
    assert content.keys() == build_model(thousand, torch.device("cpu"), torch.float32).state_dict().keys()
    assert_same(open_source(str(tmp_path / "one.pt"), model=thousand.model), thousand)


def test_every_form_exports_to_every_other(thousand: WeightsSource, tmp_path: Path) -> None:
    """A chain of exports keeps every bit, and the names of the classes where the form has them."""
    from dataclasses import replace

    named = replace(thousand, class_names={0: "tench", 4: "hammerhead, hammerhead shark"})
    export(named, tmp_path / "1.safetensors")
    bare = ["--model", "DiT-Ti/2", "--image-size", "32", "--num-classes", "5"]
    vae = ["--vae", str(named.vae)]
    chain: list[tuple[str, str, str, list[str]]] = [
        ("1.safetensors", "diffusers", "2", []),
        ("2", "pt", "3.pt", ["--timestep-embedding", "paper"]),
        ("3.pt", "diffusers", "4", [*bare, *vae]),
        ("2", "safetensors", "5.safetensors", ["--timestep-embedding", "paper"]),
    ]
    for source, form, out, more in chain:
        paths = [str(tmp_path / source), "--out", str(tmp_path / out)]
        assert cli.main(["export", *paths, "--to", form, *more]) == 0
    assert_same(open_source(str(tmp_path / "4")), named)
    last = open_source(str(tmp_path / "5.safetensors"))
    assert_same(last, named)
    assert (last.model, last.class_names) == (named.model, named.class_names)


def test_a_bare_file_may_have_been_trained_with_the_frequencies_of_diffusers(
    thousand: WeightsSource, tmp_path: Path
) -> None:
    export_pt(thousand, tmp_path / "bare.pt")
    opened = open_source(str(tmp_path / "bare.pt"), None, thousand.model, "diffusers")
    assert opened.model.timestep_embedding == "diffusers"
    export(opened, tmp_path / "own.safetensors")
    assert open_source(str(tmp_path / "own.safetensors")).model == opened.model


def test_the_timestep_embedding_binds_a_run() -> None:
    assert identity(TrainConfig())["model.timestep_embedding"] == "paper"


@pytest.mark.parametrize("to_source", [str, lambda run: f"{run}/own.safetensors"])
def test_a_source_that_defines_its_timestep_embedding(to_source: Callable[[Path], str], run: Path) -> None:
    export(open_source(str(run)), run / "own.safetensors")
    with pytest.raises(ConfigError, match="defines its own timestep embedding; omit --timestep-embedding"):
        open_source(to_source(run), timestep_embedding="diffusers")


def test_a_file_has_no_ema_profiles(run: Path) -> None:
    export(open_source(str(run)), run / "own.safetensors")
    with pytest.raises(ConfigError, match=r"own.safetensors has no EMA profiles; omit --ema"):
        open_source(str(run / "own.safetensors"), ema="first")


def test_raw_weights_of_a_training_checkpoint_are_said(thousand: WeightsSource, tmp_path: Path) -> None:
    path = tmp_path / "0400000.pt"
    torch.save({"model": thousand.state, "opt": {}}, path)
    source = open_source(str(path), model=thousand.model)
    assert (source.description, source.ema) == (
        f"{path} (weights under 'model'; the file has no EMA)",
        "raw",
    )


def test_models_without_a_published_layout(tmp_path: Path, run: Path, tiny_vae: str) -> None:
    with pytest.raises(WeightsError, match=r"adaln_zero and 1000 diffusion .* got adaln_zero and 100;"):
        export_pt(open_source(str(run)), tmp_path / "x.pt")
    config = tiny_config(run, tiny_vae)
    model = config.model.model_copy(update={"conditioning": "in_context"})
    with pytest.raises(WeightsError, match="got in_context and 1000; export to safetensors"):
        export_pt(WeightsSource(model, random_weights(config, 0), "a test"), tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("form", "out", "complaint"),
    [
        ("pt", "x.safetensors", "expected a name that ends in .pt"),
        ("safetensors", "x", "expected a name that ends in .safetensors"),
        ("diffusers", "here", "here exists; choose another name, or delete it first"),
        ("diffusers", "s3://bucket/x", "expected a file on this machine"),
    ],
)
def test_outputs_are_checked_first(
    form: str, out: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    out = out if "://" in out else str(tmp_path / out)
    assert cli.main(["export", "no such source", "--to", form, "--out", out]) == 2
    assert complaint in capsys.readouterr().err
