"""Kernel Inception Distance: the squared maximum mean discrepancy with a cubic kernel, unbiased.

    value = kid(generated, real)                 # all pairs of images
    mean_and_std = kid_of_subsets(generated, real)     # the convention of papers: 100 subsets of 1,000

Binkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", 2018, Section 4. Papers often print 1,000 KID.

Shapes: N generated images, M real images, F features, R C rows and columns of a block, S subsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dit_scale.data.order import permute
from dit_scale.dist import World
from dit_scale.errors import DataError
from dit_scale.evaluate import pairs
from dit_scale.evaluate.pairs import I64, Matrix

NUM_SUBSETS = 100
SUBSET_IMAGES = 1000
SUBSET_SEED = 0


@dataclass(frozen=True)
class SubsetKid:
    """The mean and the standard deviation of KID over random subsets of both sets."""

    mean: float
    std: float
    """Spread between subsets: not the standard error of the mean, because subsets overlap."""
    num_subsets: int
    num_images: int
    """Images of each subset: fewer than SUBSET_IMAGES if a set has fewer."""


def kid(generated_NF: Matrix, real_MF: Matrix, world: World | None = None, side: int = 0) -> float:
    """Return the unbiased estimate from all pairs. It may be negative if the sets are alike.

    With `world`, all ranks call this with all features and share the work. `side` is the number of rows of a
    tile; 0 chooses it. Raises DataError if the numbers of features differ or a set has fewer than 2 images.
    """
    _check(generated_NF, real_MF)
    # Each rank has its part of every mean.
    return sum(pairs.gather(_estimate(generated_NF, real_MF, world, pairs.device_of(world), side), world))


def kid_of_subsets(
    generated_NF: Matrix,
    real_MF: Matrix,
    num_subsets: int = NUM_SUBSETS,
    num_images: int = SUBSET_IMAGES,
    seed: int = SUBSET_SEED,
    world: World | None = None,
) -> SubsetKid:
    """Return the mean and standard deviation of KID over random subsets, drawn without replacement.

    With `world`, each rank computes some of the subsets.
    """
    _check(generated_NF, real_MF)
    num_images = min(num_images, len(generated_NF), len(real_MF))
    values = [
        _estimate(
            generated_NF[_drawn(len(generated_NF), num_images, seed, subset, branch=0)],
            real_MF[_drawn(len(real_MF), num_images, seed, subset, branch=1)],
            world=None,
            device=pairs.device_of(world),
        )
        for subset in pairs.rows_of_rank(num_subsets, world)
    ]
    values_S = np.concatenate(pairs.gather(np.array(values), world))
    return SubsetKid(float(values_S.mean()), float(values_S.std()), num_subsets, num_images)


def _check(generated_NF: Matrix, real_MF: Matrix) -> None:
    if generated_NF.shape[1] != real_MF.shape[1]:
        raise DataError(
            f"KID between {generated_NF.shape[1]} and {real_MF.shape[1]} features; "
            "compute images and reference with the same network"
        )
    if min(len(generated_NF), len(real_MF)) < 2:
        raise DataError(
            f"KID needs 2 images or more of each kind, got {len(generated_NF)} generated, {len(real_MF)} real"
        )


def _drawn(num: int, num_images: int, seed: int, subset: int, branch: int) -> I64:
    """Return the images of a subset, sorted: the first ones of a keyed permutation."""
    drawn = permute(np.arange(num_images, dtype=np.uint64), num, seed, subset, branch)
    return np.sort(drawn.astype(np.int64))


def _estimate(x_NF: Matrix, y_MF: Matrix, world: World | None, device: torch.device, side: int = 0) -> float:
    """Return this rank's part of the unbiased squared discrepancy.

    Gretton et al., "A Kernel Two-Sample Test", 2012, Equation 3: the means of k over different images
    within each set, minus twice the mean over pairs from both sets.
    """
    side = side or pairs.side_of(x_NF.shape[1])
    rows, columns = pairs.tiles(range(len(x_NF)), side), pairs.tiles(range(len(y_MF)), side)
    blocks = [(row, column) for row in rows for column in columns]
    between = _kernel_sum(x_NF, y_MF, pairs.share_of(blocks, world), device) / (len(x_NF) * len(y_MF))
    return _mean_within(x_NF, world, device, side) + _mean_within(y_MF, world, device, side) - 2 * between


def _mean_within(x_NF: Matrix, world: World | None, device: torch.device, side: int) -> float:
    """Return this rank's part of the mean of k(x_i, x_j) over all i != j."""
    tiles = pairs.tiles(range(len(x_NF)), side)
    above = [(row, column) for row in tiles for column in tiles if row.start < column.start]
    diagonal = pairs.share_of(tiles, world)
    total = 2 * _kernel_sum(x_NF, x_NF, pairs.share_of(above, world), device)
    total += _kernel_sum(x_NF, x_NF, [(tile, tile) for tile in diagonal], device)
    for tile in diagonal:
        itself_R = np.square(pairs.load(x_NF, tile)).sum(axis=1) / x_NF.shape[1]
        total -= float(((itself_R + 1.0) ** 3).sum())
    return total / (len(x_NF) * (len(x_NF) - 1))


def _kernel_sum(
    x_NF: Matrix, y_MF: Matrix, blocks: Sequence[tuple[range, range]], device: torch.device
) -> float:
    """Return the sum of k(x, y) = (x.y / F + 1)^3 over blocks of pairs."""
    total = 0.0
    for rows, columns in blocks:
        x_RF, y_CF = pairs.on(device, pairs.load(x_NF, rows)), pairs.on(device, pairs.load(y_MF, columns))
        total += float((x_RF @ y_CF.T).div_(x_RF.shape[1]).add_(1.0).pow_(3).sum())
    return total
