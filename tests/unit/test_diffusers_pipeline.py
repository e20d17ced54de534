"""Folders of diffusers' DiTPipeline: stock diffusers loads them and samples what this program samples.

Shapes: B images, C latent channels, h w latent sides.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_scale import rng, weights
from dit_scale.config import ModelConfig
from dit_scale.errors import ConfigError, StorageError, WeightsError
from dit_scale.inference.export import export_pipeline
from dit_scale.inference.sources import WeightsSource, build_model, open_source
from dit_scale.models.dit import build
from dit_scale.models.embeddings import timestep_sinusoid
from dit_scale.rng import Purpose
from dit_scale.sampling.denoise import denoise, sampling_schedule
from dit_scale.sampling.settings import SamplingSettings
from dit_scale.weights.pipeline import is_pipeline, read_pipeline

MODEL = ModelConfig(name="DiT-Ti/2", image_size=32, num_classes=10, timestep_embedding="diffusers")
NAMES = {label: f"class {label}, n{label:08}" for label in range(10)}
LABELS = [0, 3, 9, 3]
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor if name == "pos_embed" else 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in build(config, seed=0).state_dict().items()
    }


def make_source(vae: str, timesteps: int = 1000, **changes: Any) -> WeightsSource:
    model = MODEL.model_copy(update=changes)
    return WeightsSource(
        model, random_state(model), "a test", timesteps=timesteps, vae=vae, class_names=NAMES
    )


@pytest.fixture(scope="module")
def source(tiny_vae: str) -> WeightsSource:
    return make_source(tiny_vae)


@pytest.fixture(scope="module")
def folder(source: WeightsSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "pipeline"
    export_pipeline(source, out)
    return out


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder to change: as diffusers itself writes it, without our metadata."""
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    save_file(load_file(out / TRANSFORMER), out / TRANSFORMER)
    return out


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- the same function and the same samples


@contextmanager
def stock_pipeline(folder: Path, noise_BChw: Tensor) -> Iterator[Callable[..., Tensor]]:
    """Load the folder in diffusers and yield a function that samples latents from this noise."""
    from diffusers import DiTPipeline
    from diffusers.pipelines.dit import pipeline_dit

    pipeline = DiTPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.labels == {
        **{f"class {label}": label for label in range(10)},
        **{f"n{label:08}": label for label in range(10)},
    }
    latents: list[Tensor] = []
    decode = pipeline.vae.decode

    def record(z_BChw: Tensor) -> Any:
        latents.append(z_BChw * pipeline.vae.config.scaling_factor)
        return decode(z_BChw)

    def sample(guidance: float, steps: int) -> Tensor:
        pipeline(LABELS, guidance_scale=guidance, num_inference_steps=steps, output_type="np")
        return latents[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.vae, "decode", record)
        patch.setattr(pipeline_dit, "randn_tensor", lambda shape, **_: noise_BChw.reshape(shape))
        yield sample


def our_latents(source: WeightsSource, guidance: float, steps: int) -> Tensor:
    model = build_model(source, torch.device("cpu"), torch.float32)
    settings = SamplingSettings(
        method="ddim", steps=f"ddim{steps}", guidance=guidance, guidance_channels="all"
    )
    schedule = sampling_schedule(source.timesteps, settings, "cpu")
    (*_, z_BChw) = denoise(model, schedule, torch.tensor(LABELS), torch.arange(len(LABELS)), settings)
    return z_BChw


def distance(one_BChw: Tensor, other_BChw: Tensor) -> float:
    """Return the largest difference in standard deviations; a trained model's latents have about 1."""
    return float((one_BChw - other_BChw).abs().max() / other_BChw.std())


def start_noise() -> Tensor:
    return rng.normals(0, Purpose.SAMPLE_START, torch.arange(len(LABELS)), (4, 4, 4))


@pytest.mark.parametrize(("guidance", "steps"), [(1.0, 20), (4.0, 20), (1.5, 50)])
def test_stock_diffusers_samples_the_same_latents(
    source: WeightsSource, folder: Path, guidance: float, steps: int
) -> None:
    with stock_pipeline(folder, start_noise()) as sample:
        theirs = sample(guidance, steps)
    ours = our_latents(source, guidance, steps)
    print(f"largest difference {(difference := distance(ours, theirs)):.1e}")
    assert difference < 1e-4


def test_a_paper_model_is_another_function_in_diffusers(tiny_vae: str, tmp_path: Path) -> None:
    """Reading the folder computes what diffusers computes; as the paper's, it is the run again."""
    source = make_source(tiny_vae, timestep_embedding="paper")
    export_pipeline(source, tmp_path / "pipeline")
    with stock_pipeline(tmp_path / "pipeline", start_noise()) as sample:
        theirs = sample(1.5, 20)
    as_diffusers = our_latents(open_source(str(tmp_path / "pipeline")), 1.5, 20)
    as_paper = our_latents(open_source(str(tmp_path / "pipeline"), timestep_embedding="paper"), 1.5, 20)
    assert distance(as_diffusers, theirs) < 1e-4
    assert distance(as_paper, theirs) > 1e-2
    assert torch.equal(as_paper, our_latents(source, 1.5, 20))


def test_other_numbers_of_diffusion_steps(tiny_vae: str, tmp_path: Path) -> None:
    source = make_source(tiny_vae, timesteps=100)
    export_pipeline(source, tmp_path / "pipeline")
    assert open_source(str(tmp_path / "pipeline")).timesteps == 100
    with stock_pipeline(tmp_path / "pipeline", start_noise()) as sample:
        assert distance(our_latents(source, 1.5, 20), sample(1.5, 20)) < 1e-4


@pytest.mark.parametrize(("name", "shift"), [("paper", 0), ("diffusers", 1)])
def test_timestep_embeddings_equal_those_of_diffusers(name: str, shift: int) -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.arange(1000)
    model = build(MODEL.model_copy(update={"timestep_embedding": name}), seed=0)
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    assert torch.equal(timestep_sinusoid(t, model.t_embedder.divisor), theirs)


def test_the_sinusoid_is_the_papers_by_default() -> None:
    assert ModelConfig().timestep_embedding == "paper"
    t = torch.tensor([999])
    assert torch.equal(timestep_sinusoid(t), timestep_sinusoid(t, 128))
    assert not torch.equal(timestep_sinusoid(t), timestep_sinusoid(t, 127))


# --- round trips


def test_the_folder_holds_the_same_bits(source: WeightsSource, folder: Path) -> None:
    back = open_source(str(folder))
    assert (back.model, back.timesteps, back.class_names) == (MODEL, 1000, NAMES)
    assert back.vae == str(folder / "vae")
    assert back.state.keys() == source.state.keys()
    assert all(torch.equal(back.state[name], tensor) for name, tensor in source.state.items())
    assert back.description == f"diffusers pipeline {folder}, timestep embedding of diffusers"


def test_a_folder_that_diffusers_saved(folder: Path, source: WeightsSource, tmp_path: Path) -> None:
    """It has 1000 classes, of which those after the first ten are null classes; shards are read, too."""
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    assert len(list((tmp_path / "saved" / "transformer").glob("*-of-*.safetensors"))) > 1
    back = open_source(str(tmp_path / "saved"))
    assert back.model == MODEL.model_copy(update={"num_classes": 1000})
    table, own = (one.state["y_embedder.embedding_table.weight"] for one in (back, source))
    assert torch.equal(table[:10], own[:10])
    assert torch.equal(table[10:], own[-1:].expand(991, -1))


def test_half_precision_and_pickled_transformers(copy: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in load_file(copy / TRANSFORMER).items()}
    (copy / TRANSFORMER).unlink()
    torch.save(state, copy / TRANSFORMER.replace(".safetensors", ".bin"))
    back = read_pipeline(copy)
    assert {tensor.dtype for tensor in back.state.values()} == {torch.float32}


# --- what cannot be read or written


def test_an_existing_folder_is_refused(source: WeightsSource, folder: Path) -> None:
    before = sorted(folder.parent.iterdir())
    with pytest.raises(StorageError, match=r"pipeline exists; choose another name, or delete it first"):
        export_pipeline(source, folder)
    assert sorted(folder.parent.iterdir()) == before


def test_a_failed_export_leaves_nothing(
    source: WeightsSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(StorageError, match=r"cannot write .*pipeline: No space left"):
        export_pipeline(source, tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "changes", "complaint"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "expected a DiTPipeline, got 'FluxPipeline'"),
        ("model_index.json", {"id2label": ["tench"]}, "expected id2label to map class numbers to names"),
        ("transformer/config.json", {"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel', exp"),
        ("transformer/config.json", {"norm_type": "ada_norm"}, "norm_type is 'ada_norm', expected 'ada_n"),
        ("transformer/config.json", {"out_channels": 4}, "out_channels is 4, expected 8"),
        ("transformer/config.json", {"norm_eps": 1e-3}, "norm_eps is 0.001, expected 1e-06 or 1e-05"),
        ("transformer/config.json", {"num_layers": 5}, "no DiT has 5 layers of width 128 with 4 heads"),
        ("transformer/config.json", {"patch_size": "2"}, "patch_size is '2', expected a number above 0"),
        ("transformer/config.json", {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
         "missing tensor"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"}, "is 'scaled_linear', exp"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.012}, "beta_end is 0.012, expected 0.02 at 1000"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "is 0.0001, expected 0.0002"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "is 'v_prediction', exp"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "is True, expected False"),
    ],
)  # fmt: skip
def test_other_pipelines_are_refused(file: str, changes: dict[str, Any], complaint: str, copy: Path) -> None:
    change_json(copy / file, **changes)
    with pytest.raises(WeightsError, match=complaint):
        read_pipeline(copy)


@pytest.mark.parametrize("file", ["transformer/config.json", "scheduler/scheduler_config.json", TRANSFORMER])
def test_missing_and_damaged_files(file: str, copy: Path) -> None:
    (copy / file).write_text("{")
    with pytest.raises(WeightsError, match=r"is not JSON|is damaged or not a safetensors file"):
        read_pipeline(copy)
    (copy / file).unlink()
    with pytest.raises(WeightsError, match=r"is missing; expected the files that|has no diffusion_pytorch"):
        read_pipeline(copy)


def test_a_flipped_bit_is_found(folder: Path, copy: Path) -> None:
    data = bytearray((folder / TRANSFORMER).read_bytes())
    data[-100] ^= 1
    (copy / TRANSFORMER).write_bytes(data)
    with pytest.raises(WeightsError, match=r"is damaged \(SHA-256 mismatch\)"):
        read_pipeline(copy)


def test_models_that_the_pipeline_cannot_sample_from(tiny_vae: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"expected a model with at most 1000 classes, got 1001"):
        export_pipeline(make_source(tiny_vae, num_classes=1001), tmp_path / "pipeline")
    with pytest.raises(WeightsError, match="diffusers supports only conditioning adaln_zero"):
        export_pipeline(make_source(tiny_vae, conditioning="adaln"), tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []


def test_the_vae_must_be_the_one_of_the_latents(source: WeightsSource, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(WeightsError, match="did not make the latents"):
        export_pipeline(replace(source, vae_sha256="0" * 64), tmp_path / "pipeline")
    with pytest.raises(WeightsError, match="a test does not name its VAE; pass --vae"):
        export_pipeline(replace(source, vae=None), tmp_path / "pipeline")


def test_options_that_a_folder_does_not_take(folder: Path, tmp_path: Path) -> None:
    assert is_pipeline(folder)
    assert not is_pipeline(tmp_path)
    with pytest.raises(ConfigError, match="has no EMA profiles; omit --ema"):
        open_source(str(folder), ema="paper")
    with pytest.raises(ConfigError, match="defines its own model; omit --model"):
        open_source(str(folder), model=MODEL)


def test_a_transformer_file_alone_is_not_a_published_file(folder: Path) -> None:
    with pytest.raises(WeightsError, match="weights do not match the model"):
        weights.load_into(build(MODEL, seed=0), weights.read(folder / TRANSFORMER))
