"""Steps of Triton's AdamW beside those of torch's; importing this imports triton."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_scale.kernels import adamw
from dit_scale.kernels.adamw import TritonAdamW

KINDS = ("exp_avg", "exp_avg_sq")


class Compared(NamedTuple):
    """Masters, first and second moments and averages after some steps, one row each; counts of updates."""

    found: np.ndarray
    expected: np.ndarray
    updates: tuple[float, float]


def compare(num: int, weight_decay: float, weights: tuple[float, ...], skipped: int) -> Compared:
    """Take a step per weight of the average; step `skipped` has a NaN among its gradients and is skipped."""
    generator = torch.Generator().manual_seed(num)
    start = torch.randn(num, generator=generator)
    masters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    averages = [start.clone() for _ in range(2)]
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
    triton_adamw = TritonAdamW(masters[:1], **settings)
    torch_adamw = torch.optim.AdamW(masters[1:], fused=True, **settings)  # type: ignore[arg-type]
    for step, weight in enumerate(weights):
        gradient = torch.randn(num, generator=generator) * 10.0 ** (-step / 3)
        if step == skipped:
            gradient[0] = torch.nan
        for master, optimizer in zip(masters, (triton_adamw, torch_adamw), strict=True):
            master.grad = gradient.clone()
            optimizer.found_inf = torch.tensor(float(step == skipped))  # type: ignore[union-attr]
        triton_adamw.followers[masters[0].data_ptr()] = (averages[0], weight)
        triton_adamw.step()
        assert triton_adamw.followers == {}
        torch_adamw.step()
        torch._foreach_lerp_(averages[1:], [masters[1].data], weight)
    states = triton_adamw.state[masters[0]], torch_adamw.state[masters[1]]
    found, expected = (
        torch.stack([master.detach(), *(state[kind] for kind in KINDS), average]).numpy()
        for master, state, average in zip(masters, states, averages, strict=True)
    )
    return Compared(found, expected, (states[0]["step"].item(), states[1]["step"].item()))


def launches(sizes: tuple[int, ...], flat: bool) -> tuple[list[int], bool]:
    """Step masters of these sizes, with gradients in one buffer or not.

    Returns the numbers of parameters by launch, and whether the bits are those of a step of one flat master.
    """
    total = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, total, generator=generator)
    results: list[Tensor] = []
    counted: list[int] = []
    merge = adamw.merge_neighbours
    for lengths in ((total,), sizes):
        whole = start.clone()
        masters = list(whole.split(lengths))
        gradients = gradient.clone().split(lengths)
        optimizer = TritonAdamW(masters, lr=1e-3)
        moments = torch.zeros(2, total)
        for master, grad, *pair in zip(
            masters, gradients, *(row.split(lengths) for row in moments), strict=True
        ):
            master.grad = grad if flat else grad.clone()
            optimizer.state[master].update(dict(zip(KINDS, pair, strict=True)), step=torch.zeros(()))
        states = [
            ((master, master.grad, *(optimizer.state[master][kind] for kind in KINDS)), torch.zeros(()))
            for master in masters
        ]
        counted = [state[0].numel() for state, _ in merge(states)]  # type: ignore[arg-type]
        optimizer.step()
        results.append(whole)
    return counted, torch.equal(*results)
