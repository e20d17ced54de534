"""How far the last update moved the master weights, from what the optimizer keeps: no copy of the weights."""

from collections.abc import Iterator, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from dit_scale.checkpoint.partition import EXP_AVG, EXP_AVG_SQ, MASTER, Partition
from dit_scale.train.grad_norm import gradient_norm
from dit_scale.train.run_state import merge_ranges

Norms = tuple[float, float]
"""Squared L2 norms of the last update and of the masters."""

CHUNK = 2**22
"""Elements that are computed together: two temporary buffers of this size."""


@torch.no_grad()
def update_norms(owned: Sequence[Partition], settings: dict[str, Any], updates: int) -> Norms:
    """Return the squared norms of AdamW's last update, number `updates`, and of the owned masters.

    Loshchilov & Hutter 2019, Algorithm 2: with learning rate a, weight decay w, and the direction
    d = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) of the t-th update,

        x_t = x_{t-1} - a (w x_{t-1} + d),   therefore   x_t - x_{t-1} = -a (w x_t + d) / (1 - a w)

    So the update follows from the masters and moments after it, up to the rounding of fp32, with every
    implementation of AdamW. `settings` has the lr, betas, eps and weight_decay of that update. Waits for the
    device.
    """
    beta1, beta2 = settings["betas"]
    rate, decay = settings["lr"], settings["weight_decay"]
    correction1, correction2 = 1.0 - beta1**updates, 1.0 - beta2**updates
    norms = []
    for master, exp_avg, exp_avg_sq in _chunks(owned):
        divisor = exp_avg_sq.sqrt().div_(sqrt(correction2)).add_(settings["eps"])
        direction = (decay * master).addcdiv_(exp_avg, divisor, value=1.0 / correction1)
        norms.append(torch.stack((gradient_norm([direction]), gradient_norm([master]))))
    direction_sq, master_sq = torch.stack(norms).double().square().sum(0).tolist()
    return (rate / (1.0 - rate * decay)) ** 2 * direction_sq, master_sq


def update_ratio(ranks: Sequence[Norms | None]) -> float | None:
    """Return the norm of the update divided by that of the masters, over all ranks; None before an update."""
    norms = [norms for norms in ranks if norms is not None]
    if not norms:
        return None
    updates, masters = map(sum, zip(*norms, strict=True))
    return sqrt(updates / masters)


def _chunks(owned: Sequence[Partition]) -> Iterator[tuple[Tensor, ...]]:
    """Yield masters and both moments in chunks, without the padding of the buffers."""
    for partition in owned:
        buffers = [partition.buffers[kind].data for kind in (MASTER, EXP_AVG, EXP_AVG_SQ)]
        ranges = ((piece.offset, piece.offset + piece.length) for piece in partition.slices)
        for start, end in merge_ranges(tuple(ranges)):
            yield from zip(*(buffer[start:end].split(CHUNK) for buffer in buffers), strict=True)
