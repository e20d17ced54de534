"""The matrix product to which MFU is relative."""

import math

import pytest
import torch

from dit_scale.telemetry import matmul
from dit_scale.telemetry.matmul import FEWEST_REPEATS, REPEATS, matmul_flops_per_s
from tests.support.operators import Operators

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_limits_the_number_of_products(dtype: torch.dtype) -> None:
    for budget_s, repeats in ((0.0, FEWEST_REPEATS), (math.inf, REPEATS)):
        with Operators() as seen:
            assert matmul_flops_per_s(dtype, CPU, side=8, budget_s=budget_s) > 0
        assert seen.called["aten::mm.out"] == 2 + repeats  # a warm-up and a trial


def test_a_product_counts_two_operations_per_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "median_s", lambda *_: 0.5)
    assert matmul_flops_per_s(torch.float32, CPU, side=10) == 4000.0
