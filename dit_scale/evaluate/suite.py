"""The evaluation suite: all figures of a set of images against a reference, under one network.

Every function here is collective: all ranks call it and get the same figures.

Shapes: N images, F pooled features, C classes.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dit_scale.choices import METRICS
from dit_scale.dist import World
from dit_scale.errors import DataError
from dit_scale.evaluate.cache import F32, FeatureRows
from dit_scale.evaluate.extract import extract
from dit_scale.evaluate.features import FeatureNetwork
from dit_scale.evaluate.frechet import bias_note, frechet_distance, frechet_with_error
from dit_scale.evaluate.images import ImageSet
from dit_scale.evaluate.inception_score import SHUFFLE_SEED, InceptionScore, inception_score
from dit_scale.evaluate.kid import kid, kid_of_subsets
from dit_scale.evaluate.moments import HasGaussian
from dit_scale.evaluate.neighbours import neighbour_scores
from dit_scale.evaluate.references import (
    ImageReference,
    MadeReference,
    Reference,
    Statistics,
)
from dit_scale.evaluate.scorecard import Result
from dit_scale.evaluate.statistics import moments_of, random_blocks

ERROR_BLOCKS = 10
_IS_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Extractor:
    """Computes or reads features on all ranks, and knows the digests of the sets of images."""

    cache_root: Path
    world: World

    def digest(self, images: ImageSet) -> str:
        """Return the digest of a set of images; rank 0 reads all bytes. Collective."""
        return self.world.broadcast(images.digest)

    def rows(self, images: ImageSet, sha256: str, network: FeatureNetwork) -> FeatureRows:
        """Return the features of all images, whose digest is given, under a network. Collective."""
        return extract(images, sha256, network, self.cache_root, self.world)


@dataclass(frozen=True, eq=False)
class Scored:
    """Images to score, and what to compare them with."""

    images: ImageSet
    sha256: str
    reference: Reference

    def check_sizes(self) -> None:
        """Raise DataError unless images and reference have one resolution."""
        size = self.reference.image_size
        if size not in (None, self.images.image_size):
            raise DataError(
                f"{self.images.source} has images of {self.images.image_size} px, the reference "
                f"{self.reference.description()['source']} has {size} px; a score across resolutions "
                "measures the resize. Pass a reference of the same resolution, or for image files --crop "
                f"{self.images.image_size}"
            )


def evaluate(
    scored: Scored,
    network: FeatureNetwork,
    extractor: Extractor,
    *,
    metrics: Collection[str] = METRICS,
    with_errors: bool = False,
) -> tuple[list[Result], list[str]]:
    """Return all figures under a network, and warnings about their bias. Collective.

    Figures whose inputs the network or the reference does not have are left out. `with_errors` adds the
    standard error of the Frechet distance. Raises DataError if the reference does not match.
    """
    scored.check_sizes()
    world = extractor.world
    rows_of = partial(extractor.rows, network=network)
    statistics = scored.reference.statistics(network, rows_of, world)
    rows = rows_of(scored.images, scored.sha256)
    result = partial(Result, network=network.identity.name, samples=scored.images.count)
    results, biases = _frechet(
        network=network,
        rows=rows,
        statistics=statistics,
        metrics=metrics,
        with_errors=with_errors,
        world=world,
    )
    if "is" in metrics and rows.probabilities_NC is not None:
        results += [
            result(metric=name, value=score.mean, note=_spread(score))
            for name, seed in (("IS", SHUFFLE_SEED), ("IS, as stored", None))
            for score in (_inception_score(rows.probabilities_NC, seed),)
        ]
    if statistics.rows_MF is not None:
        results += _pairwise(network, rows.pool_NF, statistics.rows_MF, metrics, world)
    return results, biases


def _frechet(
    *,
    network: FeatureNetwork,
    rows: FeatureRows,
    statistics: Statistics,
    metrics: Collection[str],
    with_errors: bool,
    world: World,
) -> tuple[list[Result], list[str]]:
    """Return the Frechet distances on pooled and on spatial features."""
    is_inception = network.identity.name.startswith("inception")
    count = len(rows.pool_NF)
    chosen: list[tuple[str, F32, HasGaussian]] = []
    if "frechet" in metrics:
        chosen.append(("FID" if is_inception else "FD", rows.pool_NF, statistics.pool))
    if "sfid" in metrics and rows.spatial_NS is not None and statistics.spatial is not None:
        chosen.append(("sFID" if is_inception else "sFD", rows.spatial_NS, statistics.spatial))
    results, biases = [], []
    for name, rows_NF, gaussian in chosen:
        moments = moments_of(rows_NF, world)
        results.append(
            Result(
                metric=name,
                network=network.identity.name,
                value=world.broadcast(partial(frechet_distance, moments, gaussian)),
                samples=count,
                reference_images=statistics.count,
                standard_error=world.broadcast(partial(_error, rows_NF, gaussian)) if with_errors else None,
            )
        )
        if note := bias_note(gaussian, count):
            biases.append(f"{name} ({network.identity.name}): {note}")
    return results, biases


def _error(rows_NF: F32, gaussian: HasGaussian) -> float:
    return frechet_with_error(random_blocks(rows_NF, ERROR_BLOCKS), gaussian).standard_error


def _pairwise(
    network: FeatureNetwork, rows_NF: F32, real_MF: F32, metrics: Collection[str], world: World
) -> list[Result]:
    """Return the figures that compare single images."""
    figures: dict[str, tuple[float, str]] = {}
    if "neighbours" in metrics:
        scores = neighbour_scores(real_MF, rows_NF, world)
        for name in ("precision", "recall", "density", "coverage"):
            figures[name] = (getattr(scores, name), "")
    if "kid" in metrics:
        figures["KID"] = (kid(rows_NF, real_MF, world), "all pairs")
        subsets = kid_of_subsets(rows_NF, real_MF, world=world)
        figures["KID, subsets"] = (
            subsets.mean,
            f"std {subsets.std:.4g} over {subsets.num_subsets} subsets of {subsets.num_images}",
        )
    return [
        Result(
            metric=name,
            network=network.identity.name,
            value=value,
            samples=len(rows_NF),
            reference_images=len(real_MF),
            note=note,
        )
        for name, (value, note) in figures.items()
    ]


def _spread(score: InceptionScore) -> str:
    return "one split" if score.num_splits == 1 else f"std {score.std:.4g} over {score.num_splits} splits"


def _inception_score(probabilities_NC: F32, seed: int | None) -> InceptionScore:
    count = len(probabilities_NC)
    tiles = (probabilities_NC[at : at + _IS_BLOCK] for at in range(0, count, _IS_BLOCK))
    return inception_score(tiles, count, seed)


def make_reference(
    images: ImageSet, networks: Collection[FeatureNetwork], extractor: Extractor
) -> MadeReference:
    """Return the statistics of images under each network, to be written to a file. Collective."""
    sha256 = extractor.digest(images)
    reference = ImageReference(images, sha256)
    made = []
    for network in networks:
        rows_of = partial(extractor.rows, network=network)
        made.append((network.identity, reference.statistics(network, rows_of, extractor.world)))
    return MadeReference(images, sha256, made)
