"""Precision and recall, density and coverage: scores from nearest neighbours.

    scores = neighbour_scores(real, generated)            # features (M, F) and (N, F), np.memmap or arrays

Each image is the centre of a ball that reaches to its k-th nearest neighbour within its own set, itself not
counted. A rank computes a slice of the rows; its results merge exactly, so that scores do not depend on the
number of ranks, on the size of tiles or on the device (see `pairs.exact`).

Shapes: N generated images, M real images, F features, K numbers of neighbours, R C rows and columns of a
block, P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_scale.dist import World
from dit_scale.errors import DataError
from dit_scale.evaluate import pairs
from dit_scale.evaluate.moments import F64
from dit_scale.evaluate.pairs import CPU, I64, Matrix

MANIFOLD_NEIGHBOURS = 3
"""k of precision and recall: Kynkaanniemi et al. 2019 and the ADM suite."""
DENSITY_NEIGHBOURS = 5
"""k of density and coverage: Naeem et al. 2020."""


@dataclass(frozen=True)
class NeighbourScores:
    """Four scores; all but density are at most 1."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True, eq=False)
class Inclusions:
    """Which images lie in balls of the other set, for a slice of the generated images; merge with `+`."""

    num_precise: int
    """Generated images in a manifold ball of a real image."""
    num_density: int
    """Pairs of a generated image and a density ball of a real image that contains it."""
    recalled_M: NDArray[np.bool_]
    """Real images in a manifold ball of a generated image."""
    covered_M: NDArray[np.bool_]
    """Real images whose density ball contains a generated image."""

    def __add__(self, other: "Inclusions") -> "Inclusions":
        return Inclusions(
            self.num_precise + other.num_precise,
            self.num_density + other.num_density,
            self.recalled_M | other.recalled_M,
            self.covered_M | other.covered_M,
        )

    def scores(self, num_generated: int) -> NeighbourScores:
        """Return the scores, once the slices of all generated images are merged.

        Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019,
        Equations 1 to 3; Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", 2020,
        Equations 4 and 5.
        """
        return NeighbourScores(
            precision=self.num_precise / num_generated,
            recall=float(self.recalled_M.mean()),
            density=self.num_density / (DENSITY_NEIGHBOURS * num_generated),
            coverage=float(self.covered_M.mean()),
        )


def neighbour_scores(real_MF: Matrix, generated_NF: Matrix, world: World | None = None) -> NeighbourScores:
    """Return all four scores. With `world`, all ranks call this with all features and share the work."""
    counts = (MANIFOLD_NEIGHBOURS, DENSITY_NEIGHBOURS)
    real_M2 = _all_radii(real_MF, counts, world)
    generated_N = _all_radii(generated_NF, counts[:1], world)[:, 0]
    mine = inclusions(
        real_MF,
        generated_NF,
        real_radii_M2=real_M2,
        generated_radii_N=generated_N,
        rows=pairs.rows_of_rank(len(generated_NF), world),
        device=pairs.device_of(world),
    )
    first, *rest = pairs.gather(mine, world)
    return sum(rest, start=first).scores(len(generated_NF))


def _all_radii(features_NF: Matrix, counts: Sequence[int], world: World | None) -> F64:
    rows = pairs.rows_of_rank(len(features_NF), world)
    mine_RK = squared_radii(features_NF, counts, rows, pairs.device_of(world))
    return np.concatenate(pairs.gather(mine_RK, world))


def squared_radii(
    features_NF: Matrix, counts: Sequence[int], rows: range, device: torch.device = CPU, side: int = 0
) -> F64:
    """Return the squared distance to the k-th nearest neighbour, for each k of `counts` => (rows, K) float64.

    `side` is the number of rows of a tile; 0 chooses it. Raises DataError if there are too few images.
    """
    most = max(counts)
    if len(features_NF) <= most:
        raise DataError(
            f"{len(features_NF)} images have no {most}-th nearest neighbours; use at least {most + 1} images"
        )
    side = side or pairs.side_of(features_NF.shape[1])
    nearest = [np.zeros((0, most))]
    for tile in pairs.tiles(rows, side):
        x_RF = pairs.load(features_NF, tile)
        nearest_RK = np.full((len(tile), most), np.inf)
        for columns in pairs.tiles(range(len(features_NF)), side):
            y_CF = x_RF if columns == tile else pairs.load(features_NF, columns)
            squared_RC, error = pairs.products(pairs.on(device, x_RF), pairs.on(device, y_CF))
            squared_RC.diagonal(tile.start - columns.start).fill_(torch.inf)  # an image and itself
            row_P, column_P = _candidates(squared_RC, nearest_RK, error)
            nearest_RK = _smallest(nearest_RK, row_P, pairs.exact(x_RF, y_CF, row_P, column_P))
        nearest.append(nearest_RK)
    return np.concatenate(nearest)[:, [count - 1 for count in counts]]


def _candidates(squared_RC: Tensor, nearest_RK: F64, error: float) -> tuple[I64, I64]:
    """Return the pairs of a block that can be among the K nearest of their row."""
    limit_R = torch.from_numpy(nearest_RK[:, -1]).to(squared_RC.device)
    num = nearest_RK.shape[1]
    if squared_RC.shape[1] >= num:
        # The K smallest approximate values bound the K-th smallest exact one of this block.
        kth_R = squared_RC.topk(num, dim=1, largest=False).values[:, -1] + error
        limit_R = torch.minimum(limit_R, kth_R)
    near_RC = (squared_RC <= limit_R[:, None] + error) & (squared_RC < torch.inf)
    row_P, column_P = near_RC.nonzero(as_tuple=True)
    return row_P.cpu().numpy(), column_P.cpu().numpy()


def _smallest(nearest_RK: F64, row_P: I64, squared_P: F64) -> F64:
    """Return the K smallest values of each row, sorted, of those so far and of new ones."""
    order = np.lexsort((squared_P, row_P))
    row_P, squared_P = row_P[order], squared_P[order]
    place_P = np.arange(len(row_P)) - np.searchsorted(row_P, row_P)
    kept = place_P < nearest_RK.shape[1]
    new_RK = np.full_like(nearest_RK, np.inf)
    new_RK[row_P[kept], place_P[kept]] = squared_P[kept]
    return np.sort(np.concatenate((nearest_RK, new_RK), axis=1), axis=1)[:, : nearest_RK.shape[1]]


def inclusions(
    real_MF: Matrix,
    generated_NF: Matrix,
    real_radii_M2: F64,
    generated_radii_N: F64,
    rows: range,
    device: torch.device = CPU,
    side: int = 0,
) -> Inclusions:
    """Compare some rows of the generated images with all real images.

    `real_radii_M2` holds the squared radii of the manifold and the density balls of the real images. The
    border belongs to the ball for precision and recall, as in the ADM suite, and does not for density and
    coverage, as in their authors' code.
    """
    side = side or pairs.side_of(real_MF.shape[1])
    recalled_M, covered_M = np.zeros(len(real_MF), dtype=bool), np.zeros(len(real_MF), dtype=bool)
    num_precise = num_density = 0
    for tile in pairs.tiles(rows, side):
        x_RF = pairs.load(generated_NF, tile)
        precise_R = torch.zeros(len(tile), dtype=torch.bool)
        own_R1 = torch.from_numpy(generated_radii_N[tile.start : tile.stop, None])
        for columns in pairs.tiles(range(len(real_MF)), side):
            here = slice(columns.start, columns.stop)
            manifold_1C, density_1C = torch.from_numpy(real_radii_M2[here].T.copy())[:, None]
            squared_RC = _decidable(
                x_RF, pairs.load(real_MF, columns), (manifold_1C, density_1C, own_R1), device
            )
            precise_R |= (squared_RC <= manifold_1C).any(dim=1)
            recalled_M[here] |= (squared_RC <= own_R1).any(dim=0).numpy()
            dense_RC = squared_RC < density_1C
            covered_M[here] |= dense_RC.any(dim=0).numpy()
            num_density += int(dense_RC.sum())
        num_precise += int(precise_R.sum())
    return Inclusions(num_precise, num_density, recalled_M, covered_M)


def _decidable(x_RF: F64, y_CF: F64, radii: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return squared distances (R, C) that are exact wherever one is close to a radius, on the CPU."""
    squared_RC, error = pairs.products(pairs.on(device, x_RF), pairs.on(device, y_CF))
    squared_RC = squared_RC.cpu()
    close_RC = torch.zeros_like(squared_RC, dtype=torch.bool)
    for radius in radii:
        close_RC |= (squared_RC - radius).abs_() <= error
    row_P, column_P = (index.numpy() for index in close_RC.nonzero(as_tuple=True))
    squared_RC[row_P, column_P] = torch.from_numpy(pairs.exact(x_RF, y_CF, row_P, column_P))
    return squared_RC
