"""The FLOP/s of a matrix product: what a device reaches in practice, and what MFU is relative to."""

import math

import torch

from dit_scale.models.zoo import FLOPS_PER_MAC
from dit_scale.telemetry.clock import median_s

SIDE = {"cuda": 8192, "cpu": 1024}
REPEATS, FEWEST_REPEATS = 50, 3


def matmul_flops_per_s(
    dtype: torch.dtype, device: torch.device, side: int | None = None, budget_s: float = math.inf
) -> float:
    """Measure the FLOP/s of a product of two square matrices of normal random numbers.

    The median of 50 products, or of as many as fit into `budget_s`, but at least 3. Matrices of zeros would
    draw less power and run faster than training can.
    """
    side = side or SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    trial_s = median_s(multiply, 1, 1, device)
    repeats = int(min(REPEATS, max(FEWEST_REPEATS, budget_s / trial_s)))
    return float(FLOPS_PER_MAC * side**3 / median_s(multiply, 0, repeats, device))
