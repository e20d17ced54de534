"""The parts of the demo: the digits on disk, the shipped VAE, and the score of samples."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_scale import vae
from dit_scale.errors import DataError

DEMO = Path(__file__).parents[2] / "demo"
sys.path.append(str(DEMO))

import digits  # noqa: E402
import score  # noqa: E402
import train_vae  # noqa: E402

NUM_DIGITS = 1797


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return digits.write_images(tmp_path_factory.mktemp("demo") / "digits")


@pytest.fixture(scope="module")
def crops():
    return digits.crops(64)


@pytest.fixture
def write(tmp_path):
    def write(images, labels):
        np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=labels)
        return tmp_path / "samples.npz"

    return write


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}


def test_digits_are_class_folders(folder):
    assert sorted(path.name for path in folder.iterdir()) == [str(label) for label in range(10)]
    counts = [len(list((folder / str(label)).iterdir())) for label in range(10)]
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert sum(counts) == NUM_DIGITS


def test_digits_are_the_same_bytes_each_time(folder, tmp_path):
    assert files(digits.write_images(tmp_path / "again")) == files(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_finished_folder_is_kept(folder):
    before = os.stat(folder / "0").st_mtime_ns, os.stat(folder).st_ino
    digits.write_images(folder)
    assert (os.stat(folder / "0").st_mtime_ns, os.stat(folder).st_ino) == before


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all I have")
    with pytest.raises(DataError, match="choose another folder"):
        digits.write_images(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all I have"


def test_files_and_scikit_learn_give_the_same_crops(folder, crops):
    from_files, labels = digits.crops(64, folder)
    np.testing.assert_array_equal(from_files, crops[0])
    np.testing.assert_array_equal(labels, crops[1])


def test_split_holds_out_a_fifth_of_each_class(crops):
    labels = crops[1]
    fit, held_out = digits.split(labels)
    assert sorted([*fit, *held_out]) == list(range(NUM_DIGITS))
    share = np.bincount(labels[held_out]) / np.bincount(labels)
    assert np.abs(share - 0.2).max() < 0.01


@pytest.fixture(scope="module")
def round_trip(crops):
    """Return pixels, labels, reconstructions and latents of fifty held-out digits, five per class."""
    autoencoder = vae.load(DEMO / "vae")
    _, held_out = digits.split(crops[1])
    chosen = np.concatenate([held_out[crops[1][held_out] == label][:5] for label in range(10)])
    moments = autoencoder.encode(train_vae.to_input(crops[0][chosen]))
    mean, std = moments.chunk(2, dim=1)
    z = autoencoder.scale * (mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))
    return crops[0][chosen], crops[1][chosen], autoencoder.decode(z).numpy(), z


def test_the_shipped_vae_is_small_and_has_the_geometry_of_stable_diffusion(round_trip):
    assert sum(path.stat().st_size for path in (DEMO / "vae").iterdir()) < train_vae.MAX_BYTES
    identity = vae.find_vae(str(DEMO / "vae")).identity
    assert (identity.downsample, identity.latent_channels) == (8, 4)
    assert round_trip[3].shape == (50, 4, 8, 8)


def test_vae_scale_gives_unit_latents(round_trip):
    assert 0.9 < round_trip[3].std() < 1.1


def test_vae_reconstructs_held_out_digits(crops, round_trip):
    pixels, labels, rebuilt, _ = round_trip
    error = digits.to_levels(rebuilt) - digits.to_levels(pixels)
    assert np.sqrt(np.mean(error**2)) < 0.5  # of 16 levels
    fit, _ = digits.split(crops[1])
    classifier = score.fit_classifier(digits.to_levels(crops[0][fit]), crops[1][fit])
    assert classifier.share_recognised(digits.to_levels(rebuilt), labels) >= 0.98


def test_real_digits_score_high_and_are_all_copies(crops, folder, write):
    path = write(*crops)
    result = score.score(path)
    assert result["classifier_held_out"] > score.MIN_HELD_OUT
    assert result["recognised"] > 0.99
    assert set(result["recognised_per_class"]) == set("0123456789")
    assert abs(result["recognised_shuffled_labels"] - 0.1) < 0.03
    assert result["copies"] == NUM_DIGITS
    assert result["distance_samples"]["median"] < 1e-5
    assert score.score(path, folder) == result
    assert (path.parent / "score.json").is_file()


def test_reconstructions_count_as_copies(round_trip, write):
    """The score detects a model that memorised its training set."""
    _, labels, rebuilt, _ = round_trip
    result = score.score(write(rebuilt, labels))
    assert result["copies"] == len(labels)


def test_held_out_digits_are_not_copies(crops):
    levels = digits.to_levels(crops[0])
    fit, held_out = digits.split(crops[1])
    found = score.distances(levels[held_out], levels[fit])
    assert found["copies"] <= 0.02 * len(held_out)
    assert found["distance_samples"]["median"] == pytest.approx(found["distance_real"]["median"], rel=0.05)


def test_noise_scores_near_chance(write):
    rng = np.random.default_rng(0)
    result = score.score(write(rng.integers(0, 256, (500, 64, 64, 3), np.uint8), np.arange(500) % 10))
    assert result["recognised"] < 0.15
    assert result["copies"] == 0


def test_nearest_equals_the_direct_computation():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 16, (5, 8, 8)), rng.uniform(0, 16, (7, 8, 8))
    slow = np.sqrt(((a[:, None] - b) ** 2).sum((2, 3)))
    np.testing.assert_allclose(score.nearest(a, b), slow.min(1))
    np.testing.assert_allclose(score.nearest(a, b, 1), np.sort(slow, axis=1)[:, 1])


@pytest.mark.parametrize(
    "arrays",
    [
        {"arr_0": np.zeros((2, 64, 64, 3), np.uint8)},
        {"arr_0": np.zeros((2, 64, 64, 3)), "arr_1": np.zeros(2)},
        {"arr_0": np.zeros((2, 60, 60, 3), np.uint8), "arr_1": np.zeros(2)},
        {"arr_0": np.zeros((2, 64, 64, 3), np.uint8), "arr_1": np.zeros(3)},
        {"arr_0": np.zeros((0, 64, 64, 3), np.uint8), "arr_1": np.zeros(0)},
    ],
)
def test_foreign_samples_are_refused(arrays, tmp_path):
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(DataError, match="arr_1"):
        score.score(tmp_path / "samples.npz")


def test_no_samples_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"samples\.npz"):
        score.score(tmp_path / "samples.npz")


def test_a_poor_classifier_is_refused(crops, write, monkeypatch):
    shuffled = np.random.default_rng(0).permutation(crops[1])
    monkeypatch.setattr(score, "crops", lambda size, folder: (crops[0], shuffled))
    with pytest.raises(DataError, match="the classifier recognises"):
        score.score(write(*crops))


@pytest.mark.parametrize(("at_least", "code"), [("0.95", 0), ("1.0", 1)])
def test_too_low_a_score_exits_1(at_least, code, crops, write, monkeypatch, capsys):
    labels = crops[1][::10].copy()
    labels[:3] = 9
    path = write(crops[0][::10], labels)
    monkeypatch.setattr(sys, "argv", ["score.py", str(path), "--at-least", at_least])
    assert score.main() == code
    said = capsys.readouterr()
    assert "copies" in said.out
    assert ("expected 100.0% or more" in said.err) == (code == 1)
