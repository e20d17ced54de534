"""Statistics of features: moments over all ranks, and the rows that neighbours need.

Shapes: N images, M chosen rows, F features, B blocks.
"""

import numpy as np
import torch

from dit_scale.data.order import rank_slice, sample_ids
from dit_scale.dist import World
from dit_scale.evaluate.cache import F32
from dit_scale.evaluate.moments import Moments

MAX_ROWS = 10_000
"""Reference images that precision, recall, density, coverage and KID use, as in the ADM suite."""
_BLOCK = 4096
"""Rows to read at a time."""


def moments_of(rows_NF: F32, world: World) -> Moments:
    """Return the moments of all rows, on all ranks; each rank reads its share. Collective."""
    own, num_features = rank_slice(len(rows_NF), world.rank, world.size), rows_NF.shape[1]
    blocks = (
        Moments.of(rows_NF[at : min(at + _BLOCK, own.stop)]) for at in range(own.start, own.stop, _BLOCK)
    )
    return _merged(Moments.merge(blocks, num_features), len(rows_NF), world)


def _merged(own: Moments, count: int, world: World) -> Moments:
    """Merge the moments of all ranks, in the memory of one.

    Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance", 1983, for any number of parts:
    scatter = sum_i (scatter_i + n_i (m_i - m)(m_i - m)^T).
    """
    mean_F = _sum(own.count / count * own.mean_F, world)
    gap_F = own.mean_F - mean_F
    return Moments(count, mean_F, _sum(own.scatter_FF + own.count * np.outer(gap_F, gap_F), world))


def _sum(array: np.ndarray, world: World) -> np.ndarray:
    total: np.ndarray = world.sum(torch.from_numpy(array).to(world.device)).cpu().numpy()
    return total


def random_blocks(rows_NF: F32, num_blocks: int) -> list[Moments]:
    """Return the moments of disjoint random blocks of rows, for a standard error; the same blocks always."""
    order_N = sample_ids(np.arange(len(rows_NF)), len(rows_NF), seed=0)
    parts = np.array_split(order_N, num_blocks)
    return [
        Moments.merge(
            (Moments.of(rows_NF[np.sort(part[at : at + _BLOCK])]) for at in range(0, len(part), _BLOCK)),
            rows_NF.shape[1],
        )
        for part in parts
    ]


def chosen_rows(count: int) -> np.ndarray:
    """Return the numbers of the images of a reference that neighbours use: all, or 10,000 drawn once.

    The first 10,000 of a sorted folder would show the first classes only.
    """
    if count <= MAX_ROWS:
        return np.arange(count)
    return np.sort(sample_ids(np.arange(MAX_ROWS), count, seed=0))
