"""DINOv2 as a feature network, with a tiny random model from a folder."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dit_scale.errors import ConfigError, WeightsError
from dit_scale.evaluate.networks import load_network
from dit_scale.evaluate.networks.dinov2 import resample_positions, to_input


def write_model(folder: Path, image_size: int) -> Path:
    """Write a random DINOv2 with 2 layers of width 24, trained, as it were, at another size."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=image_size,
        patch_size=14,
    )
    model = Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dinov2"), image_size=70)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(256, (3, 40, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_are_the_normalized_class_token(tmp_path: Path, images: torch.Tensor) -> None:
    """At the size of its position table, the network is what transformers computes."""
    from transformers import Dinov2Model

    write_model(tmp_path, image_size=224)
    features = load_network(f"dinov2:{tmp_path}")(images)
    model = Dinov2Model.from_pretrained(tmp_path, local_files_only=True).eval()
    with torch.no_grad():
        tokens_NPD = model(to_input(images)).last_hidden_state
    assert tokens_NPD.shape == (3, 257, 24)
    assert features.pool_NF.shape == (3, 24)
    torch.testing.assert_close(features.pool_NF, tokens_NPD[:, 0], rtol=1e-5, atol=1e-5)
    assert features.pool_NF.std(dim=0).min() > 0  # images differ
    assert features.spatial_NS is None
    assert features.probabilities_NC is None


def test_the_input_is_pillows_resize_and_imagenets_statistics(images: torch.Tensor) -> None:
    x = to_input(images)
    resized = Image.fromarray(images[1].numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    judge = (np.asarray(resized) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert x.shape == (3, 3, 224, 224)
    np.testing.assert_allclose(x[1].permute(1, 2, 0), judge, atol=1e-6)


def cubic(distance: float) -> float:
    """Weight of a pixel in Keys' cubic convolution with a = -0.75, torch's bicubic."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def test_positions_are_resampled_as_the_published_code_does() -> None:
    """Position i reads (i + 1/2) * old / (side + 0.1) - 1/2; without the 0.1 it would be another network."""
    old, side = 37, 16
    line = torch.randn(old, generator=torch.Generator().manual_seed(0))
    table_1PD = torch.cat([torch.tensor([7.0]), line.repeat(old)])[None, :, None]
    resampled = resample_positions(table_1PD, side)
    assert resampled.shape == (1, side * side + 1, 1)
    assert resampled[0, 0, 0] == 7
    for offset, agrees in ((0.1, True), (0.0, False)):
        sources = [(i + 0.5) * old / (side + offset) - 0.5 for i in range(side)]
        expected = [
            sum(cubic(source - k) * line[min(max(k, 0), old - 1)].item() for k in range(-3, old + 3))
            for source in sources
        ]
        row = resampled[0, 1:, 0].reshape(side, side)[5].tolist()
        assert (max(abs(a - b) for a, b in zip(row, expected, strict=True)) < 1e-4) is agrees


def test_positions_of_the_right_number_stay() -> None:
    table = torch.randn(1, 257, 4, generator=torch.Generator().manual_seed(0))
    assert resample_positions(table, 16) is table


def test_resampled_positions_reach_the_network(folder: Path, images: torch.Tensor) -> None:
    features = load_network(f"dinov2:{folder}")(images)
    assert features.pool_NF.shape == (3, 24)
    assert features.pool_NF.isfinite().all()


def test_an_image_has_the_same_bits_in_every_batch_of_one_shape(folder: Path, images: torch.Tensor) -> None:
    network = load_network(f"dinov2:{folder}")
    assert torch.equal(
        network(images).pool_NF[1], network(torch.stack([images[2], images[1], 255 - images[0]])).pool_NF[1]
    )


def test_its_identity_holds_what_features_depend_on(folder: Path) -> None:
    identity = load_network(f"dinov2:{folder}").identity
    assert identity.name == "dinov2, 2 layers of 24, patch 14"
    assert len(identity.weights_sha256) == 64
    assert identity.preprocessing == "Pillow bicubic to 224 x 224, mean and std of ImageNet"
    assert identity.precision == "fp32 without TF32"


def test_a_missing_tensor_is_an_error_and_not_a_random_number(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    state = load_file(copy / "model.safetensors")
    del state["encoder.layer.1.mlp.fc1.weight"]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"does not match config\.json.*layer\.1\.mlp\.fc1\.weight"):
        load_network(f"dinov2:{copy}")


def test_a_truncated_file_is_an_error(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(WeightsError, match="cannot load the DINOv2"):
        load_network(f"dinov2:{copy}")


def test_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(WeightsError, match="expected model_type 'dinov2', got 'clip'"):
        load_network(f"dinov2:{copy}")
    (copy / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="is no configuration"):
        load_network(f"dinov2:{copy}")


def test_a_name_of_the_hub_is_refused_with_the_command_that_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"has no config\.json and no model\.safetensors.*hf download"):
        load_network("dinov2:facebook/dinov2-large")


def test_without_transformers_the_error_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'dit-scale\[dinov2\]'"):
        load_network(f"dinov2:{folder}")
