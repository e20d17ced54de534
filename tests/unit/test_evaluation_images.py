"""Samples for the evaluation: the same at every evaluation, and references that do not fit are refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from dit_scale.config import EvaluateConfig, ModelConfig
from dit_scale.data.shards import LatentDataset
from dit_scale.dist import World
from dit_scale.errors import ConfigError, DataError, WeightsError
from dit_scale.evaluate.frechet import frechet_distance
from dit_scale.evaluate.moments import Gaussian, Moments
from dit_scale.models import dit
from dit_scale.train.evaluation_images import Painter, Tile, grid_of
from tests.support.evaluated_run import CLASSIFIER, NUM_FEATURES, write_ground
from tests.support.tiny_vae import save_tiny_vae

Ground = dict[str, str]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return write_ground(tmp_path_factory.mktemp("ground"), num=20)


def alone() -> World:
    """A world of one process, without a group: nothing here communicates."""
    return World(0, 1, torch.device("cpu"), torch.distributed.ProcessGroup(0, 1))


def painter_of(ground: Ground, vae: str = "", **evaluate: Any) -> Painter:
    settings = {
        "every_steps": 1,
        "grid_images": 3,
        "images": 6,
        "network": f"classifier:{CLASSIFIER}",
        "reference": ground["reference"],
        "sampling_steps": 2,
        "tile": 4,
        **evaluate,
    }
    config = EvaluateConfig.model_validate(settings)
    dataset = LatentDataset.open(ground["url"])
    return Painter(config, dataset, vae or ground["vae"], 100, alone())


def model() -> dit.DiT:
    return dit.build(ModelConfig(name="DiT-Nano/2", image_size=32, num_classes=10), 0)


def painted(painter: Painter, advance: Callable[[], None] = lambda: None, compare: bool = True) -> list[Tile]:
    numbers = range(painter.tiles(compare=compare))
    return [painter.paint(model(), number, advance, compare=compare) for number in numbers]


def test_tiles_give_the_grid_and_the_features_that_are_asked_for(ground: Ground) -> None:
    painter, beats = painter_of(ground), list[int]()
    tiles = painted(painter, advance=lambda: beats.append(1))
    assert [len(tile.grid_NHW3) for tile in tiles] == [3, 0]
    features = [tile.features_NF for tile in tiles if tile.features_NF is not None]
    assert [part.shape for part in features] == [(4, NUM_FEATURES), (2, NUM_FEATURES)]
    assert grid_of(tiles).shape == (3, 32, 32, 3)
    assert len(beats) == 2 * 2
    expected = frechet_distance(
        Moments.of(np.concatenate(features)), Gaussian(np.zeros(NUM_FEATURES), np.eye(NUM_FEATURES))
    )
    assert painter.distance(tiles) == expected


def test_a_grid_alone_needs_no_network(ground: Ground) -> None:
    painter = painter_of(ground, images=0, network="", reference="")
    (tile,) = painted(painter)
    assert tile.features_NF is None


def test_weights_that_are_not_compared_have_the_same_grid_and_no_features(ground: Ground) -> None:
    painter = painter_of(ground)
    (tile,) = painted(painter, compare=False)
    assert tile.features_NF is None
    assert np.array_equal(tile.grid_NHW3, grid_of(painted(painter)))


def test_broken_features_have_no_distance(ground: Ground) -> None:
    painter = painter_of(ground, images=4)
    (tile,) = painted(painter)
    assert tile.features_NF is not None
    tile.features_NF[0, 0] = np.nan
    assert painter.distance([tile]) is None


def test_a_reference_of_another_network_is_refused(ground: Ground, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DataError, match=r"2048 features in mu, the network .* has 64"):
        painter_of(ground, reference=str(tmp_path / "other.npz"))


@pytest.mark.parametrize("content", ["nothing", "no npz", "images", "images of another size", "other keys"])
def test_a_file_that_is_no_reference_is_refused(ground: Ground, tmp_path: Path, content: str) -> None:
    path = tmp_path / "reference.npz"
    match content:
        case "no npz":
            path.write_bytes(b"no npz")
        case "images":
            np.savez(path, arr_0=np.zeros((2, 32, 32, 3), np.uint8))
        case "images of another size":
            statistics = {"mu": np.zeros(NUM_FEATURES), "sigma": np.eye(NUM_FEATURES)}
            np.savez(path, arr_0=np.zeros((2, 64, 64, 3), np.uint8), **statistics)
        case "other keys":
            np.savez(path, scores=np.zeros(3))
    with pytest.raises((ConfigError, DataError), match=re.escape(str(path))):
        painter_of(ground, reference=str(path))


def test_another_autoencoder_is_refused(ground: Ground, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="did not make the latents"):
        painter_of(ground, vae=save_tiny_vae(tmp_path / "vae", seed=1))


def test_the_measure_names_what_the_distance_depends_on(ground: Ground) -> None:
    measures = {
        painter_of(ground, **change).measure
        for change in (
            {},
            {"images": 5},
            {"sampler": "ddim"},
            {"guidance": 2},
            {"seed": 1},
            {"sampling_steps": 3},
        )
    }
    assert len(measures) == 6
