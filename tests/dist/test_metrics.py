"""Every score of one, two and three ranks is that of one process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_scale import dist
from dit_scale.config import EngineConfig
from dit_scale.data.order import rank_slice
from dit_scale.evaluate.frechet import frechet_distance
from dit_scale.evaluate.inception_score import SplitSums
from dit_scale.evaluate.kid import kid, kid_of_subsets
from dit_scale.evaluate.moments import Moments
from dit_scale.evaluate.neighbours import neighbour_scores
from tests.support.ranks.processes import run

pytestmark = pytest.mark.dist

NUM, NUM_REAL, NUM_FEATURES, NUM_CLASSES = 203, 150, 24, 10


def scores_of(files: dict[str, Path]) -> dict[str, float]:
    """Return all scores that this rank sees after the exchange."""
    world = dist.start(EngineConfig(device="cpu"))
    try:
        real_MF, generated_NF, p_NC = (
            np.load(files[name], mmap_mode="r") for name in ("real", "generated", "probabilities")
        )
        mine = rank_slice(NUM, world.rank, world.size)
        rows = slice(mine.start, mine.stop)
        moments = Moments.of(generated_NF[rows]).arrays()
        merged = Moments.merge(map(Moments.from_arrays, world.gather(moments)), NUM_FEATURES)
        scores: dict[str, Any] = {"frechet": frechet_distance(merged, Moments.of(real_MF))}
        for name, seed in (("in order", None), ("shuffled", 0)):
            sums = world.gather(SplitSums.of(p_NC[rows], mine.start, NUM, seed, split_images=50))
            score = sum(sums[1:], start=sums[0]).score()
            scores |= {f"inception score {name}": score.mean, f"its deviation {name}": score.std}
        subsets = kid_of_subsets(generated_NF, real_MF, num_subsets=7, num_images=40, world=world)
        scores |= {"kid of subsets": subsets.mean, "its deviation": subsets.std}
        scores["kid"] = kid(generated_NF, real_MF, world, side=30)
        return scores | vars(neighbour_scores(real_MF, generated_NF, world))
    finally:
        dist.stop()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Features with many equal distances, and class probabilities."""
    rng = np.random.default_rng(0)
    arrays = {
        "real": rng.integers(0, 4, (NUM_REAL, NUM_FEATURES)).astype(np.float32) / 3,
        "generated": rng.integers(0, 4, (NUM, NUM_FEATURES)).astype(np.float32) / 3,
        "probabilities": rng.dirichlet(np.full(NUM_CLASSES, 0.2), NUM).astype(np.float32),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return {name: tmp_path / f"{name}.npy" for name in arrays}


def test_scores_do_not_depend_on_the_number_of_ranks(files: dict[str, Path]) -> None:
    (alone,) = run(1, scores_of, files)
    for world in (2, 3):
        ranks = run(world, scores_of, files)
        assert ranks == [ranks[0]] * world
        assert ranks[0] == pytest.approx(alone, rel=1e-9, abs=0)
        # Counts and exact distances: no rounding at all.
        for name in ("precision", "recall", "density", "coverage"):
            assert ranks[0][name] == alone[name]
    assert 0 < alone["precision"] < 1
    assert 0 < alone["coverage"] < 1
