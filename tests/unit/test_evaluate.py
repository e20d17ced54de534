"""Features of sets of images: tiles, the cache, resuming; and the suite of figures on top of them."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_scale.dist import World
from dit_scale.errors import DataError
from dit_scale.evaluate import cache as cache_module
from dit_scale.evaluate.cache import CHUNK, MARK, FeatureCache
from dit_scale.evaluate.features import Features, NetworkIdentity
from dit_scale.evaluate.frechet import frechet_distance
from dit_scale.evaluate.images import TILE
from dit_scale.evaluate.images.npz import NpzImages
from dit_scale.evaluate.moments import Moments
from dit_scale.evaluate.neighbours import neighbour_scores
from dit_scale.evaluate.references import ImageReference
from dit_scale.evaluate.scorecard import Result
from dit_scale.evaluate.statistics import MAX_ROWS, chosen_rows, moments_of, random_blocks
from dit_scale.evaluate.suite import Extractor, Scored, evaluate
from tests.support.scored_images import BoxNetwork, random_images, write_npz

NUM = CHUNK + TILE + 3
"""Two chunks, the second with a full and a short tile."""


@pytest.fixture
def images(tmp_path: Path) -> NpzImages:
    return NpzImages(write_npz(random_images(NUM), tmp_path / "a.npz"))


@pytest.fixture
def extractor(tmp_path: Path, world: World) -> Extractor:
    return Extractor(tmp_path / "cache", world)


def test_every_image_gets_its_row(images: NpzImages, extractor: Extractor) -> None:
    rows = extractor.rows(images, images.digest(), BoxNetwork())
    alone = BoxNetwork()(torch.from_numpy(images.read(range(NUM)).copy()))
    assert np.array_equal(rows.pool_NF, alone.pool_NF.numpy())
    assert rows.spatial_NS is not None
    assert np.array_equal(rows.spatial_NS, alone.pool_NF.numpy()[:, :5])
    assert rows.probabilities_NC is not None
    assert rows.probabilities_NC.shape == (NUM, 12)
    assert rows.pool_NF.dtype == np.float32


def test_all_passes_have_the_shape_of_a_tile(images: NpzImages, extractor: Extractor) -> None:
    shapes = []

    class Recorder(BoxNetwork):
        def __call__(self, images_NHW3: Tensor) -> Features:
            shapes.append(tuple(images_NHW3.shape))
            return super().__call__(images_NHW3)

    extractor.rows(images, images.digest(), Recorder())
    assert shapes == [(TILE, 16, 16, 3)] * 6


def test_a_second_evaluation_computes_nothing(images: NpzImages, extractor: Extractor) -> None:
    network = BoxNetwork()
    first = extractor.rows(images, images.digest(), network)
    passes = network.num_passes
    again = extractor.rows(images, images.digest(), network)
    assert network.num_passes == passes
    assert np.array_equal(first.pool_NF, again.pool_NF)
    assert isinstance(again.pool_NF, np.memmap)
    extractor.rows(images, "another digest", network)
    assert network.num_passes == 2 * passes
    extractor.rows(images, images.digest(), BoxNetwork("another network"))
    assert len(list(extractor.cache_root.iterdir())) == 3


def test_a_killed_evaluation_keeps_its_chunks(images: NpzImages, extractor: Extractor) -> None:
    class Dying(BoxNetwork):
        def __call__(self, images_NHW3: Tensor) -> Features:
            if self.num_passes == 5:
                raise KeyboardInterrupt
            return super().__call__(images_NHW3)

    with pytest.raises(KeyboardInterrupt):
        extractor.rows(images, images.digest(), Dying())
    (folder,) = extractor.cache_root.iterdir()
    assert not (folder / MARK).exists()
    resumed = BoxNetwork()
    rows = extractor.rows(images, images.digest(), resumed)
    assert resumed.num_passes == 2
    alone = BoxNetwork()(torch.from_numpy(images.read(range(NUM)).copy()))
    assert np.array_equal(rows.pool_NF, alone.pool_NF.numpy())
    assert not (folder / "chunks").exists()


@pytest.mark.parametrize("name", ["pool.npy", MARK])
def test_damaged_features_are_computed_again(
    images: NpzImages, extractor: Extractor, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = np.array(extractor.rows(images, images.digest(), BoxNetwork()).pool_NF)
    (folder,) = extractor.cache_root.iterdir()
    data = bytearray((folder / name).read_bytes())
    data[-100] ^= 1
    (folder / name).write_bytes(data)
    network = BoxNetwork()
    assert np.array_equal(extractor.rows(images, images.digest(), network).pool_NF, before)
    assert network.num_passes == 6
    assert "its features are computed again" in capfd.readouterr().err


def test_a_damaged_chunk_is_removed(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "digest", 8, NetworkIdentity("n", "0", "p"))
    cache.write_chunk(range(8), {"pool": np.zeros((8, 3), np.float32)})
    (chunk,) = cache.folder.rglob("*.npz")
    data = bytearray(chunk.read_bytes())
    data[180] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DataError, match=r"was damaged .* and is removed; run the same command again"):
        cache.assemble()
    assert [len(part) for part in cache.missing()] == [8]


def test_a_file_that_is_not_what_was_written_keeps_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(tmp_path, "digest", 8, NetworkIdentity("n", "0", "p"))
    cache.write_chunk(range(8), {"pool": np.zeros((8, 3), np.float32)})
    monkeypatch.setattr(cache_module.hashlib, "file_digest", lambda file, name: hashlib.sha256(b"other"))
    with pytest.raises(DataError, match="differs from what was written"):
        cache.assemble()
    assert cache.missing() == []


def test_features_that_are_not_finite(images: NpzImages, extractor: Extractor) -> None:
    class Broken(BoxNetwork):
        def __call__(self, images_NHW3: Tensor) -> Features:
            return Features(torch.full((TILE, 3), torch.nan))

    with pytest.raises(DataError, match="features that are not finite"):
        extractor.rows(images, images.digest(), Broken())


# Statistics


def test_moments_of_mapped_rows(world: World) -> None:
    rows_NF = np.random.Generator(np.random.Philox(key=0)).normal(size=(10_001, 3)).astype(np.float32)
    moments = moments_of(rows_NF, world)
    np.testing.assert_allclose(moments.mean_F, rows_NF.astype(np.float64).mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(moments.covariance_FF, np.cov(rows_NF.T.astype(np.float64)), rtol=1e-12)


def test_random_blocks_are_disjoint_and_complete() -> None:
    rows_NF = np.arange(103, dtype=np.float32)[:, None]
    blocks = random_blocks(rows_NF, 10)
    assert sorted(block.count for block in blocks) == [10] * 7 + [11] * 3
    merged = Moments.merge(blocks, 1)
    assert merged.count == 103
    assert merged.mean_F[0] == pytest.approx(51.0)
    assert np.std([block.mean_F[0] for block in blocks]) > 3  # not consecutive rows: those would give 29
    assert np.std([block.mean_F[0] for block in blocks]) < 20


def test_the_rows_of_a_large_reference_are_spread() -> None:
    assert np.array_equal(chosen_rows(5), np.arange(5))
    rows = chosen_rows(3 * MAX_ROWS)
    assert len(set(rows.tolist())) == MAX_ROWS
    assert np.all(np.diff(rows) > 0)
    assert np.histogram(rows, bins=3, range=(0, 3 * MAX_ROWS))[0] == pytest.approx([3333] * 3, rel=0.1)


# The suite


def scored(tmp_path: Path, extractor: Extractor, real_size: int = 16) -> Scored:
    generated = NpzImages(write_npz(random_images(NUM, seed=1), tmp_path / "generated.npz"))
    real = NpzImages(write_npz(random_images(200, size=real_size, seed=2), tmp_path / "real.npz"))
    return Scored(generated, generated.digest(), ImageReference(real, extractor.digest(real)))


def by_metric(results: list[Result]) -> dict[str, float]:
    return {result.metric: result.value for result in results}


def test_all_figures(tmp_path: Path, extractor: Extractor) -> None:
    results, biases = evaluate(scored(tmp_path, extractor), BoxNetwork(), extractor)
    figures = by_metric(results)
    assert list(figures) == [
        "FD",
        "sFD",
        "IS",
        "IS, as stored",
        "precision",
        "recall",
        "density",
        "coverage",
        "KID",
        "KID, subsets",
    ]
    assert biases == []
    network = BoxNetwork()
    one, other = (
        network(torch.from_numpy(random_images(num, seed=seed))).pool_NF.numpy()
        for num, seed in ((NUM, 1), (200, 2))
    )
    expected = frechet_distance(Moments.of(one), Moments.of(other))
    assert figures["FD"] == pytest.approx(expected, rel=1e-9)
    assert figures["precision"] == neighbour_scores(other, one).precision
    assert figures["recall"] == neighbour_scores(other, one).recall
    assert {result.samples for result in results} == {NUM}
    assert {result.reference_images for result in results} == {200, None}


def test_an_inception_network_gives_the_names_of_the_field(tmp_path: Path, extractor: Extractor) -> None:
    network = BoxNetwork("inception of another kind")
    results, _ = evaluate(scored(tmp_path, extractor), network, extractor, metrics=["frechet", "sfid"])
    assert [result.metric for result in results] == ["FID", "sFID"]


def test_a_network_without_spatial_features(tmp_path: Path, extractor: Extractor) -> None:
    metrics = ["frechet", "sfid", "is"]
    results, _ = evaluate(
        scored(tmp_path, extractor), BoxNetwork(spatial=False), extractor, metrics=metrics, with_errors=True
    )
    assert list(by_metric(results)) == ["FD", "IS", "IS, as stored"]
    assert results[0].standard_error is not None
    assert 0 < results[0].standard_error < results[0].value


def test_fewer_images_than_features_are_reported(tmp_path: Path, extractor: Extractor) -> None:
    few = NpzImages(write_npz(random_images(10), tmp_path / "few.npz"))
    real = scored(tmp_path, extractor).reference
    subject = Scored(few, few.digest(), real)
    results, biases = evaluate(subject, BoxNetwork(), extractor, metrics=["frechet"])
    assert len(results) == 1
    (bias,) = biases
    assert bias.startswith("FD (boxes): 10 images for 12 features")
    assert "would score about" in bias


def test_another_resolution_is_refused(tmp_path: Path, extractor: Extractor) -> None:
    with pytest.raises(DataError, match=r"images of 16 px, the reference .*real\.npz has 32 px"):
        evaluate(scored(tmp_path, extractor, real_size=32), BoxNetwork(), extractor)
