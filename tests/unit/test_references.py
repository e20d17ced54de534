"""References: published statistics, our own file, sets of images; what each refuses."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_scale.dist import World
from dit_scale.errors import DataError
from dit_scale.evaluate.images import ImageSet
from dit_scale.evaluate.images.npz import NpzImages
from dit_scale.evaluate.references import (
    ImageReference,
    OwnReference,
    PublishedReference,
    Reference,
    Statistics,
    open_reference,
    write_reference,
)
from dit_scale.evaluate.statistics import MAX_ROWS
from dit_scale.evaluate.suite import Extractor, make_reference
from tests.support.scored_images import BoxNetwork, random_images, write_folder, write_npz

CPU = torch.device("cpu")
REAL = random_images(40, seed=2)


@pytest.fixture
def extractor(tmp_path: Path, world: World) -> Extractor:
    return Extractor(tmp_path / "cache", world)


def opened(path: Path) -> Reference:
    return open_reference(str(path), lambda images: images.digest(), device=CPU)


def statistics(reference: Reference, extractor: Extractor, network: BoxNetwork) -> Statistics:
    def rows(images: ImageSet, sha256: str) -> object:
        return extractor.rows(images, sha256, network)

    return reference.statistics(network, rows, extractor.world)  # type: ignore[arg-type]


def pool_of(images_NHW3: np.ndarray) -> np.ndarray:
    return BoxNetwork()(torch.from_numpy(images_NHW3)).pool_NF.numpy().astype(np.float64)


def published(path: Path, **changes: np.ndarray | None) -> Path:
    pool_NF = pool_of(REAL)
    arrays = {
        "mu": pool_NF.mean(0),
        "sigma": np.cov(pool_NF.T),
        "mu_s": pool_NF[:, :5].mean(0),
        "sigma_s": np.cov(pool_NF[:, :5].T),
        "arr_0": REAL,
    } | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
    return path


def test_adms_file(tmp_path: Path, extractor: Extractor) -> None:
    reference = opened(published(tmp_path / "adm.npz"))
    assert isinstance(reference, PublishedReference)
    assert reference.image_size == 16
    assert reference.description()["images_for_neighbours"] == 40
    found = statistics(reference, extractor, BoxNetwork())
    np.testing.assert_allclose(found.pool.mean_F, pool_of(REAL).mean(0), rtol=1e-12)
    assert found.spatial is not None
    assert found.spatial.covariance_FF.shape == (5, 5)
    assert found.rows_MF is not None
    np.testing.assert_allclose(found.rows_MF, pool_of(REAL), rtol=1e-6)
    assert found.count is None


def test_edms_file_knows_only_a_gaussian(tmp_path: Path, extractor: Extractor) -> None:
    reference = opened(published(tmp_path / "edm.npz", mu_s=None, sigma_s=None, arr_0=None))
    assert reference.image_size is None
    found = statistics(reference, extractor, BoxNetwork())
    assert (found.spatial, found.rows_MF) == (None, None)


def test_images_and_our_own_file_say_the_same(tmp_path: Path, extractor: Extractor) -> None:
    folder = write_folder(REAL, tmp_path / "real")
    direct = opened(folder)
    assert isinstance(direct, ImageReference)
    networks = [BoxNetwork(), BoxNetwork("second", spatial=False)]
    made = make_reference(direct.images, networks, extractor)
    write_reference(made, tmp_path / "real.npz")
    read = opened(tmp_path / "real.npz")
    assert isinstance(read, OwnReference)
    assert read.image_size == 16
    description = read.description()
    assert (description["made_from"], description["images"]) == (str(folder), 40)
    assert description["images_sha256"] == direct.description()["images_sha256"]
    for network in networks:
        one, other = (statistics(each, extractor, network) for each in (direct, read))
        np.testing.assert_array_equal(one.pool.mean_F, other.pool.mean_F)
        np.testing.assert_array_equal(one.pool.covariance_FF, other.pool.covariance_FF)
        np.testing.assert_array_equal(one.rows_MF, other.rows_MF)  # type: ignore[arg-type]
        assert (one.count, other.count) == (40, 40)
        assert (other.spatial is None) == (network.identity.name == "second")
    before = (tmp_path / "real.npz").read_bytes()
    write_reference(made, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == before


def test_our_own_file_has_the_arrays_that_other_programs_read(tmp_path: Path, extractor: Extractor) -> None:
    images = NpzImages(write_npz(REAL, tmp_path / "real.npz"))
    write_reference(make_reference(images, [BoxNetwork()], extractor), tmp_path / "reference.npz")
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as arrays:
        pool_NF = pool_of(REAL)
        np.testing.assert_allclose(arrays["mu"], pool_NF.mean(0), rtol=1e-9)
        np.testing.assert_allclose(arrays["sigma"], np.cov(pool_NF.T), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(arrays["sigma_s"], np.cov(pool_NF[:, :5].T), rtol=1e-9, atol=1e-12)
        assert arrays["features"].dtype == np.float32


def test_a_large_reference_keeps_some_rows(extractor: Extractor, tmp_path: Path) -> None:
    images = NpzImages(write_npz(random_images(MAX_ROWS + 50, size=4), tmp_path / "real.npz"))
    made = make_reference(images, [BoxNetwork()], extractor)
    ((_, found),) = made.made
    assert found.count == MAX_ROWS + 50
    assert found.rows_MF is not None
    assert len(found.rows_MF) == MAX_ROWS


# Refusals


@pytest.mark.parametrize("change", ["name", "weights_sha256", "preprocessing", "precision"])
def test_another_network_is_refused_and_both_are_named(
    tmp_path: Path, extractor: Extractor, change: str
) -> None:
    images = NpzImages(write_npz(REAL, tmp_path / "real.npz"))
    write_reference(make_reference(images, [BoxNetwork()], extractor), tmp_path / "reference.npz")
    other = BoxNetwork()
    other.identity = replace(other.identity, **{change: "something else"})
    with pytest.raises(DataError, match=r'was made with \{"name": "boxes".*something el') as caught:
        statistics(opened(tmp_path / "reference.npz"), extractor, other)
    assert "write another reference with --make-reference" in str(caught.value)


def test_another_number_of_features_is_refused(tmp_path: Path, extractor: Extractor) -> None:
    path = published(tmp_path / "adm.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(DataError, match="has 7 features in mu, the network boxes has 12"):
        statistics(opened(path), extractor, BoxNetwork())
    path = published(tmp_path / "adm.npz", mu_s=np.zeros(7), sigma_s=np.eye(7))
    with pytest.raises(DataError, match="has 7 features in mu_s, the network boxes has 5"):
        statistics(opened(path), extractor, BoxNetwork())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, "has no sigma; it has mu, mu_s, sigma_s, arr_0"),
        ({"sigma": np.eye(3)}, r"expected mu \(F,\) and sigma \(F, F\) of floats, got .* float64 \(3, 3\)"),
        ({"mu": np.zeros(12, int)}, r"got int64 \(12,\)"),
        ({"mu": np.array([None] * 12)}, "mu holds pickled objects"),
        ({"arr_0": REAL.astype(np.float32)}, "expected arr_0 uint8"),
    ],
)
def test_statistics_of_another_form(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    path = published(tmp_path / "adm.npz", **changes)
    with pytest.raises(DataError, match=message):
        opened(path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps({"fid": {"mu": np.zeros(2), "sigma": np.eye(2)}}))
    with pytest.raises(DataError, match=r"is a pickle, .*If you trust it, convert it: python -c"):
        opened(path)


def test_an_npz_of_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(DataError, match=r"has x; expected mu and sigma \(a reference\), or arr_0"):
        opened(tmp_path / "a.npz")


def test_a_changed_protocol_is_damage(tmp_path: Path, extractor: Extractor) -> None:
    images = NpzImages(write_npz(REAL, tmp_path / "real.npz"))
    write_reference(make_reference(images, [BoxNetwork()], extractor), tmp_path / "reference.npz")
    with np.load(tmp_path / "reference.npz") as arrays:
        content = dict(arrays)
    text = content["protocol"].tobytes().replace(b'"image_size":16', b'"image_size":32')
    content["protocol"] = np.frombuffer(text, np.uint8)
    np.savez(tmp_path / "reference.npz", **content)
    with pytest.raises(DataError, match="protocol is damaged"):
        opened(tmp_path / "reference.npz")
