"""Inception against an independent implementation of TensorFlow's graph, with the same random weights."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_scale.evaluate.features import FeatureNetwork, Features
from dit_scale.evaluate.networks import load_network
from dit_scale.evaluate.networks.inception import WEIGHTS_BYTES, to_input
from dit_scale.evaluate.networks.inception_layers import InceptionV3
from tests.support import tf_inception

TOLERANCE = 1e-5
PUBLISHED_NAMES_SHA256 = "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"
"""Digest of the sorted lines "name shape" of the state dict that pytorch-fid and torch-fidelity load."""


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return tf_inception.random_weights(seed=0)


@pytest.fixture(scope="module")
def network(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> FeatureNetwork:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({name: torch.from_numpy(x) for name, x in weights.items()}, path)
    return load_network(f"inception-unverified:{path}")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(256, (2, 37, 52, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def features(network: FeatureNetwork, images: torch.Tensor) -> Features:
    return network(images)


@pytest.fixture(scope="module")
def maps(weights: dict[str, np.ndarray], images: torch.Tensor) -> dict[str, np.ndarray]:
    """All maps of the first image, by TensorFlow's names."""
    return tf_inception.run(weights, to_input(images[:1]).permute(0, 2, 3, 1).numpy())


def _largest_difference(ours: torch.Tensor, judge: np.ndarray, largest: float | None = None) -> float:
    """Return the largest difference, relative to the largest value."""
    return float(np.abs(ours.numpy() - judge).max() / (largest or np.abs(judge).max()))


def test_in_float64_it_is_the_graph_itself(
    weights: dict[str, np.ndarray], images: torch.Tensor, maps: dict[str, np.ndarray]
) -> None:
    model = InceptionV3().double()
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    with torch.no_grad():
        pool_NF, spatial_NHWC = model(to_input(images[:1]).double())
    assert _largest_difference(pool_NF, maps["pool_3"]) < 1e-13
    assert _largest_difference(spatial_NHWC, maps["mixed_6/conv"][..., :7]) < 1e-13


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    assert sum(len(shape) == 4 for shape in shapes.values()) == 94
    assert len(shapes) == 94 * 5 + 2
    assert shapes["fc.weight"] == (1008, 2048)
    assert shapes == tf_inception.expected_shapes()
    lines = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == PUBLISHED_NAMES_SHA256


def test_the_published_file_has_room_for_these_numbers_and_no_others() -> None:
    num_bytes = sum(4 * int(np.prod(shape)) for shape in tf_inception.expected_shapes().values())
    assert 0 < WEIGHTS_BYTES - num_bytes < 472 * 512  # a zip archive: about 300 bytes per tensor


def test_pooled_features_are_those_of_the_graph(features: Features, maps: dict[str, np.ndarray]) -> None:
    assert features.pool_NF.shape == (2, 2048)
    assert _largest_difference(features.pool_NF[:1], maps["pool_3"]) < TOLERANCE
    assert np.ptp(maps["pool_3"]) > 1  # else a constant would pass


def test_spatial_features_are_seven_channels_in_nhwc_order(
    features: Features, maps: dict[str, np.ndarray]
) -> None:
    judge = maps["mixed_6/conv"]
    assert judge.shape == (1, 17, 17, 192)
    assert features.spatial_NS is not None
    assert features.spatial_NS.shape == (2, 2023)
    assert (
        _largest_difference(features.spatial_NS[:1], judge[..., :7].reshape(1, 2023), judge.max()) < TOLERANCE
    )
    channels_first = judge[..., :7].transpose(0, 3, 1, 2).reshape(1, 2023)
    assert _largest_difference(features.spatial_NS[:1], channels_first) > 0.1


def test_probabilities_are_without_bias(
    features: Features, maps: dict[str, np.ndarray], weights: dict[str, np.ndarray]
) -> None:
    logits = maps["pool_3"] @ weights["fc.weight"].astype(np.float64).T
    powers = np.exp(logits - logits.max())
    ours = features.probabilities_NC
    assert ours is not None
    assert ours.shape == (2, 1008)
    assert _largest_difference(ours[:1], powers / powers.sum()) < 10 * TOLERANCE
    shifted = np.exp(logits + weights["fc.bias"] - (logits + weights["fc.bias"]).max())
    assert _largest_difference(ours[:1], shifted / shifted.sum()) > 100 * TOLERANCE


def test_an_image_has_the_same_bits_in_every_batch_of_one_shape(
    network: FeatureNetwork, images: torch.Tensor, features: Features
) -> None:
    among_others = network(torch.stack([images[1], 255 - images[0]]).roll(1, dims=0))
    assert features.spatial_NS is not None
    assert among_others.spatial_NS is not None
    assert torch.equal(among_others.pool_NF[1], features.pool_NF[1])
    assert torch.equal(among_others.spatial_NS[1], features.spatial_NS[1])
    assert not torch.equal(among_others.pool_NF[0], features.pool_NF[0])


def test_settings_of_the_program_neither_matter_nor_change(
    network: FeatureNetwork, images: torch.Tensor, features: Features
) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = network(images)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(again.pool_NF, features.pool_NF)
    assert not again.pool_NF.requires_grad


def test_pixels_reach_from_minus_one_to_almost_one() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 5, 6, 3)
    x = to_input(images)
    assert x.shape == (3, 3, 299, 299)
    assert x.amin((1, 2, 3)).tolist() == x.amax((1, 2, 3)).tolist() == [-1, 0, 127 / 128]


def test_the_identity_says_that_weights_are_unverified(network: FeatureNetwork, tmp_path: Path) -> None:
    assert network.identity.name == "inception-2015-12-05 with unverified weights"
    assert network.identity.precision == "fp32 without TF32"
    assert "TensorFlow 1 bilinear to 299 x 299 without antialias" in network.identity.preprocessing
