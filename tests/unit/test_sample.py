"""Sampling: what each image depends on, the files, and the sources of weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dit_scale import dist, rng, vae
from dit_scale.checkpoint.manifest import CheckpointId
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import EngineConfig, ModelConfig
from dit_scale.diffusion.schedule import Schedule, linear, respace
from dit_scale.errors import CheckpointError, ConfigError, DeviceError, WeightsError
from dit_scale.inference.export import export
from dit_scale.inference.sources import WeightsSource, build_model, open_source
from dit_scale.models.dit import DiT
from dit_scale.models.embeddings import sincos_pos_embed
from dit_scale.rng import Purpose
from dit_scale.sampling.denoise import denoise, sample_tile
from dit_scale.sampling.settings import SamplingSettings
from dit_scale.storage import open_storage
from tests.support import checkpoints
from tests.support.tiny_run import PROFILES, STEP, write_run

SETTINGS = SamplingSettings(seed=3, steps="6", guidance=2.0, tile=4)
LABELS = [0, 1, 2, 3, 4, 0, 1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_vae: str) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, tiny_vae)
    return folder


@pytest.fixture(scope="module")
def source(run: Path) -> WeightsSource:
    return open_source(str(run))


@pytest.fixture(scope="module")
def model(source: WeightsSource) -> DiT:
    return build_model(source, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def schedule(source: WeightsSource) -> Schedule:
    return respace(linear(source.timesteps), SETTINGS.steps)


@pytest.fixture(scope="module")
def decoder(tiny_vae: str) -> vae.Vae:
    return vae.load(tiny_vae)


def latents(
    model: DiT, schedule: Schedule, images: list[int], settings: SamplingSettings = SETTINGS
) -> Tensor:
    y_B = torch.tensor([LABELS[image] for image in images])
    (*_, z_BCHW) = denoise(model, schedule, y_B, torch.tensor(images), settings)
    return z_BCHW


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_an_image_depends_only_on_its_number_and_class(model: DiT, schedule: Schedule, method: str) -> None:
    settings = SamplingSettings(seed=3, method=method, guidance=2.0)
    together = latents(model, schedule, [0, 1, 2, 3, 4], settings)
    alone = latents(model, schedule, [3], settings)
    shuffled = latents(model, schedule, [4, 3, 0], settings)
    assert together.shape == (5, 4, 4, 4)
    assert torch.isfinite(together).all()
    limit = 1e-5 * float(together.abs().max())
    torch.testing.assert_close(alone[0], together[3], rtol=0, atol=limit)
    torch.testing.assert_close(shuffled, together[[4, 3, 0]], rtol=0, atol=limit)


def test_number_class_seed_and_guidance_all_matter(model: DiT, schedule: Schedule) -> None:
    first = latents(model, schedule, [0])
    others = [
        latents(model, schedule, [5]),  # the same class
        latents(model, schedule, [0], SamplingSettings(seed=4, guidance=2.0)),
        latents(model, schedule, [0], SamplingSettings(seed=3, guidance=1.0)),
        latents(model, schedule, [0], SamplingSettings(seed=3, guidance=2.0, guidance_channels="all")),
        latents(model, schedule, [0], SamplingSettings(seed=3, guidance=2.0, method="ddim")),
    ]
    for other in others:
        assert (first - other).abs().max() > 1e-3
    (*_, other_class) = denoise(model, schedule, torch.tensor([1]), torch.tensor([0]), SETTINGS)
    assert (first - other_class).abs().max() > 1e-6


def test_every_step_has_its_own_noise(
    model: DiT, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Purpose, int]] = []
    normals = rng.normals

    def recording(
        seed: int, purpose: Purpose, image_B: Tensor, shape: tuple[int, ...], stream: int = 0
    ) -> Tensor:
        assert (seed, image_B.tolist(), shape) == (3, [2, 0], (4, 4, 4))
        drawn.append((purpose, stream))
        return normals(seed, purpose, image_B, shape, stream)

    monkeypatch.setattr(rng, "normals", recording)
    latents(model, schedule, [2, 0])
    # The last of six steps needs no noise.
    assert drawn == [(Purpose.SAMPLE_START, 0), *((Purpose.SAMPLE_STEP, step) for step in range(5))]


def test_the_same_call_gives_the_same_bits(model: DiT, schedule: Schedule) -> None:
    assert torch.equal(latents(model, schedule, [0, 1]), latents(model, schedule, [0, 1]))


def test_images_do_not_depend_on_batches_and_processes(
    model: DiT, schedule: Schedule, decoder: vae.Vae
) -> None:
    steps: list[int] = []

    def draw(images: range, tile: int) -> np.ndarray:
        settings = SamplingSettings(seed=3, guidance=2.0, tile=tile)
        parts = [
            sample_tile(
                model,
                decoder,
                schedule,
                labels=LABELS,
                images=range(start, min(start + tile, images.stop)),
                settings=settings,
                advance=lambda: steps.append(1),
            ).numpy()
            for start in range(images.start, images.stop, tile)
        ]
        return np.concatenate(parts)

    whole = draw(range(7), 7)
    assert whole.shape == (7, 32, 32, 3)
    assert whole.dtype == np.uint8
    assert len(np.unique(whole)) > 10
    steps.clear()
    short_last_tile = draw(range(7), 4)
    assert len(steps) == 2 * len(schedule)
    spread = np.concatenate([draw(range(3), 2), draw(range(3, 7), 2)])
    for other in (short_last_tile, spread):
        assert np.abs(whole.astype(int) - other).max() <= 1


# Errors


def test_cuda_is_refused_if_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA device is visible"):
        dist.start(EngineConfig(device="cuda"))


# Sources


def assert_same_weights(one: WeightsSource, other: WeightsSource) -> None:
    assert one.model == other.model
    assert (one.timesteps, one.vae, one.vae_sha256) == (other.timesteps, other.vae, other.vae_sha256)
    assert set(one.state) == set(other.state)
    for name, tensor in one.state.items():
        assert tensor.dtype == other.state[name].dtype == torch.float32
        assert torch.equal(tensor, other.state[name])


def test_a_run_gives_its_first_profile_by_published_names(tmp_path: Path, tiny_vae: str) -> None:
    averages = write_run(tmp_path, tiny_vae)
    source = open_source(str(tmp_path))
    assert set(source.state) == {"pos_embed", *averages["first"]}
    for name, tensor in averages["first"].items():
        assert torch.equal(source.state[name], tensor)
    assert source.timesteps == 100
    assert source.vae == tiny_vae
    assert source.description == f"EMA first of {tmp_path}/{CheckpointId(STEP, 1).path()}"


def test_any_profile_can_be_chosen(run: Path, source: WeightsSource) -> None:
    second = open_source(str(run), ema=PROFILES[1])
    assert not torch.equal(second.state["x_embedder.proj.weight"], source.state["x_embedder.proj.weight"])
    with pytest.raises(CheckpointError, match="has no EMA profile 'third'; it has first, second"):
        open_source(str(run), ema="third")


def test_raw_weights_are_the_master_weights(run: Path) -> None:
    raw = open_source(str(run), ema="raw")
    assert (raw.ema, raw.step) == ("raw", STEP)
    assert raw.description.startswith("raw weights of ")
    assert not raw.state["x_embedder.proj.weight"].any()  # as the support module writes them


def test_a_checkpoint_without_ema_is_refused(tmp_path: Path, tiny_vae: str) -> None:
    write_run(tmp_path, tiny_vae)
    root = open_storage(tmp_path)
    config = Checkpoint(root, CheckpointId(STEP, 1)).manifest.config
    checkpoints.write(root, CheckpointId(STEP + 1, 1), [], config=config)
    with pytest.raises(CheckpointError, match="has no EMA profile 'first'; it has none; --ema raw takes"):
        open_source(str(tmp_path))


def test_the_position_embedding_is_the_formula_to_the_bit(run: Path, model: DiT, tmp_path: Path) -> None:
    formula = sincos_pos_embed(128, 2)
    exported = tmp_path / "weights.safetensors"
    export(open_source(str(run)), exported)
    for state in (open_source(str(run)).state, open_source(str(exported)).state, model.state_dict()):
        assert state["pos_embed"].dtype == torch.float32
        assert torch.equal(state["pos_embed"], formula)


def test_a_checkpoints_folder_is_a_source(run: Path, source: WeightsSource) -> None:
    folder = run / CheckpointId(STEP, 1).path()
    assert_same_weights(open_source(str(folder)), source)


def test_export_and_open_is_the_same_source(source: WeightsSource, tmp_path: Path) -> None:
    path = tmp_path / "new" / "weights.safetensors"
    export(source, path)
    assert_same_weights(open_source(str(path)), source)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["source"] == source.description


@pytest.mark.parametrize("part", ["what it says", "weights"])
def test_a_damaged_export_is_refused(source: WeightsSource, tmp_path: Path, part: str) -> None:
    path = tmp_path / "weights.safetensors"
    export(source, path)
    data = bytearray(path.read_bytes())
    data[-1 if part == "weights" else data.index(b'"timesteps":"') + len(b'"timesteps":"')] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"weights\.safetensors is damaged \(SHA-256 mismatch\)"):
        open_source(str(path))


def test_a_bare_weights_file_uses_the_given_model(source: WeightsSource, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(source.state, path)
    opened = open_source(str(path), model=source.model)
    assert (opened.timesteps, opened.vae, opened.vae_sha256) == (1000, None, None)
    build_model(opened, torch.device("cpu"), torch.bfloat16)
    with pytest.raises(WeightsError, match="weights do not match the model"):
        build_model(
            open_source(str(path), model=ModelConfig(name="DiT-S/8")), torch.device("cpu"), torch.float32
        )


def test_a_source_that_defines_its_model_accepts_no_other(
    run: Path, source: WeightsSource, tmp_path: Path
) -> None:
    exported = tmp_path / "weights.safetensors"
    export(source, exported)
    for path in (run, run / CheckpointId(STEP, 1).path(), exported):
        with pytest.raises(ConfigError, match=f"^{path} defines its own model; omit --model, --image-size"):
            open_source(str(path), model=source.model)


def test_the_newest_checkpoint_is_taken(tiny_vae: str, tmp_path: Path) -> None:
    for step in (STEP, STEP + 1, STEP - 1):
        write_run(tmp_path, tiny_vae, step)
    assert open_source(str(tmp_path)).description.endswith(CheckpointId(STEP + 1, 1).name)


@pytest.mark.parametrize("made", [[], ["config.yaml"]])
def test_a_folder_without_weights(tmp_path: Path, made: list[str]) -> None:
    for name in made:
        (tmp_path / name).touch()
    expected = "no committed checkpoint yet" if made else "expected a run folder, a checkpoint folder"
    with pytest.raises((CheckpointError, WeightsError), match=expected):
        open_source(str(tmp_path))


def test_a_checkpoint_of_another_version_is_named(tiny_vae: str, tmp_path: Path) -> None:
    write_run(tmp_path, tiny_vae)
    root = open_storage(tmp_path)
    config = Checkpoint(root, CheckpointId(STEP, 1)).manifest.config
    checkpoints.write(root, CheckpointId(STEP + 1, 1), [], config={**config, "new_knob": 1})
    with pytest.raises(
        CheckpointError, match=r"was written by another version of this program: .*\n.*new_knob"
    ):
        open_source(str(tmp_path))
