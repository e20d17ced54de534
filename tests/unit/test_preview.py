"""Previews of latents: which samples, which VAE, and what is decoded."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dit_scale import vae
from dit_scale.data.order import Order
from dit_scale.data.shards import LatentDataset
from dit_scale.errors import WeightsError
from dit_scale.inference.preview import GAP, decode, random_ids, side_by_side
from dit_scale.vae import load_decoder
from tests.support.latents import edit_info, write_latents
from tests.support.tiny_vae import save_tiny_vae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vae(tmp_path_factory.mktemp("pictures") / "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_vae: str) -> LatentDataset:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, num=20, shard_samples=6)
    named(folder, tiny_vae)
    return LatentDataset.open(folder)


def named(folder: Path, tiny_vae: str, **changes: object) -> None:
    """Make dataset.json name this VAE."""
    edit_info(folder, vae=vae.load(tiny_vae).identity().model_dump(mode="json") | changes)


def test_random_samples_are_the_first_of_a_run_with_this_seed() -> None:
    assert random_ids(1000, 16, 3) == Order(1000, 3).ids(np.arange(16)).tolist()
    assert random_ids(1000, 16, 3)[:5] == random_ids(1000, 5, 3)
    assert random_ids(1000, 16, 3) != random_ids(1000, 16, 4)


def test_few_samples_are_shown_once_each() -> None:
    assert sorted(random_ids(7, 16, 0)) == list(range(7))


def test_both_views_are_decoded_from_their_posterior_means(dataset: LatentDataset, tiny_vae: str) -> None:
    decoder = load_decoder(dataset, tiny_vae, CPU)
    images_VHW3, label = decode(dataset, decoder, 13)
    moments, expected_label = dataset.read(13)
    assert label == expected_label == 3
    assert (images_VHW3.shape, images_VHW3.dtype) == ((2, 32, 32, 3), np.uint8)
    with torch.no_grad():
        x_23HW = decoder._model.decode(torch.from_numpy(moments[:, :4].astype(np.float32))).sample
    expected_VHW3 = (x_23HW * 127.5 + 128).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert len(np.unique(images_VHW3)) > 20
    assert np.abs(images_VHW3 - np.floor(expected_VHW3)).max() <= 1


def test_another_vae_is_refused_with_both_digests(dataset: LatentDataset, tmp_path: Path) -> None:
    other = save_tiny_vae(tmp_path / "other", seed=1)
    mine, theirs = dataset.info.vae.weights_sha256[:12], vae.load(other).identity().weights_sha256[:12]
    with pytest.raises(WeightsError, match=rf"\(other, sha256 {theirs}\) did not .* \(sha256 {mine}\)"):
        load_decoder(dataset, other, CPU)


def test_the_vae_is_looked_up_by_name(
    dataset: LatentDataset, tiny_vae: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(tiny_vae).parent)
    assert load_decoder(dataset, None, CPU).identity() == dataset.info.vae


def test_a_missing_vae_folder_is_not_looked_up_on_the_hub(
    dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vae, "find_vae", lambda name: pytest.fail(f"looked for {name}"))
    with pytest.raises(
        WeightsError, match=r"made by a VAE in a folder named 'tiny' .* pass that folder with --vae"
    ):
        load_decoder(dataset, None, CPU)


def test_a_hub_name_is_looked_up(tmp_path: Path, tiny_vae: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_latents(tmp_path, num=2)
    named(tmp_path, tiny_vae, name="someone/tiny")
    find, asked = vae.find_vae, []
    monkeypatch.setattr(vae, "find_vae", lambda name: (asked.append(name), find(tiny_vae))[1])
    load_decoder(LatentDataset.open(tmp_path), None, CPU)
    assert asked == ["someone/tiny"]


def test_side_by_side() -> None:
    shades = np.array([10, 20, 30], np.uint8)[:, None, None, None]
    wide = side_by_side(np.broadcast_to(shades, (3, 4, 6, 3)))
    assert wide.shape == (4, 3 * (6 + GAP), 3)
    assert wide[2, :, 1].tolist() == [shade for s in (10, 20, 30) for shade in [s] * 6 + [255] * GAP]
