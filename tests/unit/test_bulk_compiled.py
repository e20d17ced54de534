"""Sampling with compiled blocks and other decoders: one compilation per shape, options in the protocol."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from dit_scale.config import EngineConfig
from dit_scale.errors import StorageError
from dit_scale.inference.bulk import SampleRequest, Worker, sample_images
from dit_scale.inference.protocol import Decoding
from dit_scale.inference.sources import open_source
from dit_scale.sampling.labels import LabelChoice
from dit_scale.sampling.settings import SamplingSettings
from tests.support.tiny_run import write_run

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
NUM_IMAGES, TILE = 8, 2


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory, tiny_vae: str) -> SampleRequest:
    """Guidance in the first of two steps only, so that a tile has passes of two shapes."""
    run = tmp_path_factory.mktemp("run")
    write_run(run, tiny_vae)
    return SampleRequest(
        source=open_source(str(run)),
        vae=tiny_vae,
        num_images=NUM_IMAGES,
        labels=LabelChoice(),
        settings=SamplingSettings(steps="2", guidance=2.0, guidance_interval=(50, 99), tile=TILE),
        engine=EngineConfig(device="cpu", precision="fp32"),
    )


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def images(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as file:
        return np.asarray(file["arr_0"])


def compiled(request_: SampleRequest) -> SampleRequest:
    return replace(request_, engine=EngineConfig(device="cpu", precision="fp32", compile_blocks=True))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """For each graph that is compiled: whether choices are fixed, and whether every shape is fixed."""
    import torch._inductor.compile_fx as compiler

    seen: list[tuple[bool, bool]] = []
    real = compiler.compile_fx

    def compile_fx(graph, inputs, config_patches=None, **named):  # type: ignore[no-untyped-def]
        if config_patches is not None:  # None: it calls itself, with the settings applied
            is_static = all(isinstance(size, int) for x in inputs for size in getattr(x, "shape", [x]))
            seen.append((config_patches.get("deterministic", False), is_static))
        return real(graph, inputs, config_patches=config_patches, **named)

    monkeypatch.setattr(compiler, "compile_fx", compile_fx)
    return seen


def test_all_tiles_share_two_compilations(
    request_: SampleRequest, tmp_path: Path, asked: list[tuple[bool, bool]]
) -> None:
    """Four tiles of six blocks, in two steps: one graph with guidance, one without, and no break."""
    sample_images(request_, tmp_path / "eager")
    assert not counters["stats"]
    sample_images(compiled(request_), tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == 2
    assert asked == [(True, True), (True, True)]
    assert not counters["graph_break"]
    eager, ours = images(tmp_path / "eager").astype(int), images(tmp_path / "compiled").astype(int)
    assert len(np.unique(ours)) > 10
    assert np.abs(eager - ours).max() <= 1
    protocols = [
        json.loads((tmp_path / name / "protocol.json").read_text()) for name in ("eager", "compiled")
    ]
    assert [protocol["compiled"] for protocol in protocols] == [False, True]


def test_compiled_workers_and_batches_change_no_byte(request_: SampleRequest, tmp_path: Path) -> None:
    sample_images(compiled(request_), tmp_path / "whole")
    torch._dynamo.reset()
    parts = replace(compiled(request_), batch=3)
    assert sample_images(parts, tmp_path / "parts", Worker(1, 2)) is None
    assert sample_images(parts, tmp_path / "parts", Worker(0, 2)) == tmp_path / "parts"
    for name in ("samples.npz", "samples.json", "protocol.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (Decoding(precision="bf16"), 'vae.precision: the folder has "fp32", this command "bf16"'),
        (Decoding(channels_last=True), "vae.channels_last: the folder has false, this command true"),
    ],
)
def test_the_decoder_is_part_of_the_protocol(
    request_: SampleRequest, tmp_path: Path, option: Decoding, said: str
) -> None:
    sample_images(request_, tmp_path / "plain")
    other = replace(request_, decoding=option)
    with pytest.raises(StorageError) as caught:
        sample_images(other, tmp_path / "plain")
    assert f"\n  {said}" in str(caught.value)
    assert str(caught.value).count("\n  ") == 1
    sample_images(other, tmp_path / "other")
    difference = np.abs(images(tmp_path / "plain").astype(int) - images(tmp_path / "other"))
    assert difference.max() <= 8
