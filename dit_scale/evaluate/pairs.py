"""Blocks of products and distances between two large sets of features, and their division over ranks.

Feature matrices are fp32 and may be np.memmap: only blocks of them are ever in memory. All arithmetic is in
float64.

Shapes: N M rows, F features, P pairs.
"""

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_scale.data.order import rank_slice
from dit_scale.dist import World
from dit_scale.evaluate.moments import F64, check_finite

T = TypeVar("T")
Matrix = NDArray[Any]
"""Features (N, F), in memory or mapped from a file."""
I64 = NDArray[np.int64]

CPU = torch.device("cpu")

BLOCK_BYTES = 256 * 2**20
"""Memory of one block: two tiles of features, their distances and a few temporaries of the same size."""
MAX_SIDE = 2048
"""Larger tiles do not multiply faster."""
PAIR_BYTES = 32 * 2**20


def side_of(num_features: int) -> int:
    """Return the number of rows of a tile whose block fits into BLOCK_BYTES."""
    tiles, temporaries = 2 * 8 * num_features, 5 * 8 * MAX_SIDE
    return max(1, min(MAX_SIDE, BLOCK_BYTES // (tiles + temporaries)))


def tiles(rows: range, side: int) -> list[range]:
    """Cut a range of rows into ranges of at most `side` rows."""
    return [rows[start : start + side] for start in range(0, len(rows), side)]


def load(features_NF: Matrix, rows: range) -> F64:
    """Read a tile => float64. Raises DataError if a feature is not finite."""
    tile_NF = np.array(features_NF[rows.start : rows.stop], dtype=np.float64)
    check_finite(tile_NF)
    return tile_NF


def on(device: torch.device, tile_NF: F64) -> Tensor:
    """Move a tile to the device that multiplies; on a CPU the tensor shares its memory."""
    return torch.from_numpy(tile_NF).to(device)


def products(x_NF: Tensor, y_MF: Tensor) -> tuple[Tensor, float]:
    """Return approximate squared distances (N, M) and how far they can be from those of `exact`.

    |x|^2 + |y|^2 - 2 x.y cancels for near neighbours. Each of the three sums, and the sum in `exact`, errs by
    at most F eps / 2 times the sum of the magnitudes of its terms (Higham, "Accuracy and Stability of
    Numerical Algorithms", 2002, Section 3.1). Together: 2 F eps (|x|^2 + |y|^2).
    """
    x_N, y_M = (x_NF * x_NF).sum(dim=1), (y_MF * y_MF).sum(dim=1)
    squared_NM = torch.addmm(x_N[:, None] + y_M[None], x_NF, y_MF.T, alpha=-2.0)
    largest = float(x_N.max() + y_M.max())
    return squared_NM, (2 * x_NF.shape[1] + 16) * float(np.finfo(np.float64).eps) * largest


def exact(x_NF: F64, y_MF: F64, x_P: I64, y_P: I64) -> F64:
    """Return the squared distances of pairs, summed in one fixed order on the CPU.

    The value of a pair depends on nothing but its two rows and is symmetric. All decisions use it, so that
    results depend neither on tiles nor on ranks nor on the device, and ties are ties.
    """
    step = max(1, PAIR_BYTES // (16 * x_NF.shape[1]))
    parts = [np.zeros(0)]
    for start in range(0, len(x_P), step):
        gap_PF = x_NF[x_P[start : start + step]] - y_MF[y_P[start : start + step]]
        parts.append(np.sum(gap_PF * gap_PF, axis=1))
    return np.concatenate(parts)


def device_of(world: World | None) -> torch.device:
    """Return the device that multiplies: that of the rank, or the CPU."""
    return world.device if world else CPU


def rows_of_rank(num_rows: int, world: World | None) -> range:
    """Return the rows that this rank computes: consecutive, about equally many on each rank."""
    return rank_slice(num_rows, world.rank, world.size) if world else range(num_rows)


def share_of(work: list[T], world: World | None) -> list[T]:
    """Return the pieces of work that this rank does."""
    mine = rows_of_rank(len(work), world)
    return work[mine.start : mine.stop]


def gather(value: T, world: World | None) -> list[T]:
    """Return the value of every rank, in rank order, on all ranks."""
    return world.gather(value) if world else [value]
