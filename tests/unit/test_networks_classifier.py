"""The small classifier as a feature network, and the trained one of the demo."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_scale.errors import ConfigError, WeightsError
from dit_scale.evaluate.features import FeatureNetwork
from dit_scale.evaluate.networks import load_network
from dit_scale.evaluate.networks.classifier import (
    METADATA_KEY,
    Architecture,
    SmallClassifier,
    read,
    to_input,
    write,
)

DEMO = Path(__file__).parents[2] / "demo" / "classifier.safetensors"
sys.path.append(str(DEMO.parent))

import digits  # noqa: E402
import train_classifier  # noqa: E402

Labelled = tuple[torch.Tensor, torch.Tensor]
"""Images and their labels."""


@pytest.fixture(scope="module")
def parts() -> tuple[Labelled, Labelled]:
    """The demo's training and held-out digits at 64 px."""
    pixels_NSS3, labels_N = digits.crops(64)
    fit, held_out = (torch.from_numpy(numbers) for numbers in digits.split(labels_N))
    images, labels = torch.from_numpy(pixels_NSS3), torch.from_numpy(labels_N)
    return (images[fit], labels[fit]), (images[held_out], labels[held_out])


@pytest.fixture
def network() -> FeatureNetwork:
    return load_network(f"classifier:{DEMO}")


def test_the_demos_classifier_recognises_held_out_digits(
    network: FeatureNetwork, parts: tuple[Labelled, Labelled]
) -> None:
    _, (images_N64643, labels_N) = parts
    features = network(images_N64643)
    assert features.pool_NF.shape == (360, 64)
    assert features.spatial_NS is None
    assert features.probabilities_NC is not None
    torch.testing.assert_close(features.probabilities_NC.sum(1), torch.ones(360))
    assert (features.probabilities_NC.argmax(1) == labels_N).float().mean() >= 0.97


def test_the_file_is_small() -> None:
    assert DEMO.stat().st_size < 200_000


def test_its_identity_holds_what_features_depend_on(network: FeatureNetwork) -> None:
    identity = network.identity
    assert identity.name == "classifier"
    assert len(identity.weights_sha256) == 64
    assert identity.preprocessing == "bilinear with antialias to 32 x 32, x / 127.5 - 1"
    assert identity.precision == "fp32 without TF32"


@pytest.mark.parametrize("shape", [(3, 32, 32, 3), (2, 1, 1, 3), (1, 257, 64, 3), (4, 28, 28, 3)])
def test_any_size_has_features(network: FeatureNetwork, shape: tuple[int, ...]) -> None:
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = network(images)
    assert features.pool_NF.shape == (shape[0], 64)
    assert features.pool_NF.dtype == torch.float32
    assert features.pool_NF.isfinite().all()
    assert not features.pool_NF.requires_grad


def test_the_input_is_in_minus_one_to_one() -> None:
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 5, 9, 3)
    x = to_input(black_and_white, 4)
    assert x.shape == (2, 3, 4, 4)
    torch.testing.assert_close(x, torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4))


def test_features_are_what_the_logits_are_linear_in(network: FeatureNetwork) -> None:
    model = read(DEMO)
    features = network(torch.full((2, 64, 64, 3), 200, dtype=torch.uint8))
    probabilities = model.output(features.pool_NF).softmax(1)
    torch.testing.assert_close(probabilities, features.probabilities_NC)


def test_equal_weights_make_equal_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SmallClassifier(Architecture(classes=("cat", "dog"), input_size=16, channels=(4, 8), hidden=5))
    for name in ("a", "b", "c", "d"):
        write(model, tmp_path / f"{name}.safetensors")
    assert len({(tmp_path / f"{name}.safetensors").read_bytes() for name in "abcd"}) == 1
    again = read(tmp_path / "a.safetensors")
    assert again.architecture == model.architecture
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


def _no_metadata(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)


def _garbage(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, {METADATA_KEY: "[]"})


def _negative(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, {METADATA_KEY: json.dumps({"classes": ["a"], "hidden": -64})})


def _another_shape(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, {METADATA_KEY: json.dumps({"classes": ["a", "b"]})})


def _truncated(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(DEMO.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_no_metadata, "got no metadata"),
        (_garbage, "metadata describe no classifier"),
        (_negative, "metadata describe no classifier"),
        (_another_shape, "2 with another shape: output"),
        (_truncated, "damaged"),
    ],
)
def test_files_that_are_no_classifier_are_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Any], Path], None], words: str
) -> None:
    path = tmp_path / "file.safetensors"
    spoil(load_file(DEMO), path)
    with pytest.raises(WeightsError, match=words):
        load_network(f"classifier:{path}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights file at .*missing\.safetensors"):
        load_network(f"classifier:{tmp_path / 'missing.safetensors'}")


@pytest.mark.parametrize(
    "spec", ["", "classifier", "classifier:", "vgg:file.pth", "demo/classifier.safetensors"]
)
def test_a_specification_that_names_no_network_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="expected inception:FILE"):
        load_network(spec)


def test_training_learns_the_digits_and_repeats_its_bits(parts: tuple[Labelled, Labelled]) -> None:
    (images, labels), (held_out, held_out_labels) = parts
    x, labels = to_input(images[::2], 32), labels[::2]
    once, again = (train_classifier.trained(x, labels, seed=0, epochs=2) for _ in range(2))
    assert train_classifier.accuracy(once, to_input(held_out, 32), held_out_labels) > 0.6  # chance: 0.1
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in once.state_dict().items())
    assert once.architecture == read(DEMO).architecture
