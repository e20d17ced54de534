"""The VAE: moments, pixels, identity, and errors that name what is missing."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from dit_scale import vae, vae_files
from dit_scale.errors import WeightsError
from tests.support.tiny_vae import save_tiny_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny_vae(tmp_path_factory.mktemp("weights") / "tiny"))


@pytest.fixture(scope="module")
def tiny(folder: Path) -> vae.Vae:
    return vae.load(str(folder))


def images(num: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_moments_are_the_posteriors_mean_and_std(folder: Path, tiny: vae.Vae) -> None:
    from diffusers import AutoencoderKL

    reference = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    with torch.no_grad():
        posterior = reference.encode(images()).latent_dist
    moments = tiny.encode(images())
    assert moments.shape == (2, 8, 4, 4)
    assert moments.dtype == torch.float32
    assert torch.equal(moments, torch.cat([posterior.mean, posterior.std], dim=1))


def test_pixels_are_truncated_as_in_the_paper(tiny: vae.Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed:
        def decode(self, z: torch.Tensor) -> "Fixed":
            self.seen = z
            values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 0.9999, 1.0, 2.0])
            self.sample = values.expand(1, 3, 1, 8)
            return self

    fixed = Fixed()
    monkeypatch.setattr(tiny, "_model", fixed)
    pixels = tiny.decode(torch.full((1, 4, 1, 1), 0.18215))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (1, 1, 8, 3)
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255, 255]
    assert torch.allclose(fixed.seen, torch.ones(1))


def test_decode_turns_latents_into_images(tiny: vae.Vae) -> None:
    assert tiny.decode(torch.zeros(3, 4, 4, 4)).shape == (3, 32, 32, 3)


def test_bf16_is_near_fp32(folder: Path, tiny: vae.Vae) -> None:
    half = vae.load(str(folder), "cpu", torch.bfloat16).encode(images())
    assert half.dtype == torch.float32
    difference = (half - tiny.encode(images())).abs().max().item()
    assert 0 < difference < 0.1, f"largest difference {difference}"


def test_identity(folder: Path, tiny: vae.Vae) -> None:
    identity = tiny.identity()
    assert identity.name == "tiny"
    assert identity.scale == tiny.scale == 0.18215
    assert (identity.downsample, identity.latent_channels) == (8, 4)
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    assert identity.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert identity == vae_files.find_vae(str(folder)).identity


def test_fewer_levels_downsample_less(tmp_path: Path) -> None:
    assert vae_files.find_vae(save_tiny_vae(tmp_path / "x", num_levels=3)).identity.downsample == 4


def test_invalid_vaes_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        WeightsError, match=r"(?s)stabilityai/none.*Without a network connection: run `hf download"
    ):
        vae.load("stabilityai/none")
    with pytest.raises(WeightsError, match="neither a folder nor a hub name"):
        vae.load("no such/place/at all")
    with pytest.raises(WeightsError, match=r"no config.json and no diffusion_pytorch_model.safetensors"):
        vae.load(str(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    for change, message in (
        ({"_class_name": "VQModel"}, "expected an AutoencoderKL, got VQModel"),
        ({"shift_factor": 0.1}, "expected a VAE without shift_factor"),
        ({}, "cannot load the VAE"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(WeightsError, match=message):
            vae.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="is not JSON"):
        vae.load(str(tmp_path))
