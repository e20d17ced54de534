"""Every AdamW continues after a restore as if nothing had happened, and says what it lacks."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dit_scale import kernels
from dit_scale.config import OptimizerConfig
from dit_scale.errors import DeviceError
from dit_scale.train.optim import build_optimizer, set_moments, set_updates

CONFIG = OptimizerConfig(lr=0.1, weight_decay=0.1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def adamw_kernel(
    lists: Sequence[Sequence[Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    weight_decay: float,
) -> None:
    """AdamW with the arithmetic of the CUDA kernels that apex and DeepSpeed share."""
    assert type(step) is int, f"a kernel takes the step as a number, got {step!r}"
    for gradient, weight, exp_avg, exp_avg_sq in zip(*lists, strict=True):
        exp_avg.lerp_(gradient, 1 - betas[0])
        exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        root = (exp_avg_sq / (1 - betas[1] ** step)).sqrt()
        weight.sub_(lr * (exp_avg / (1 - betas[0] ** step) / (root + eps) + weight_decay * weight))


class ApexFusedAdam(torch.optim.Optimizer):
    """The books of apex's FusedAdam: it counts updates in the group; its state has only the moments."""

    def __init__(self, params: Any, adam_w_mode: bool, **settings: Any) -> None:
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = group["params"]
            for weight in params:
                if not self.state[weight]:
                    moments = {kind: torch.zeros_like(weight) for kind in ("exp_avg", "exp_avg_sq")}
                    self.state[weight].update(moments)
            lists = (
                [weight.grad for weight in params],
                params,
                [self.state[weight]["exp_avg"] for weight in params],
                [self.state[weight]["exp_avg_sq"] for weight in params],
            )
            settings = {key: value for key, value in group.items() if key != "params"}
            adamw_kernel(lists, **settings)


def apex(weights: list[Tensor]) -> torch.optim.Optimizer:
    modules = {"apex": ModuleType("apex"), "apex.optimizers": ModuleType("apex.optimizers")}
    modules["apex.optimizers"].FusedAdam = ApexFusedAdam  # type: ignore[attr-defined]
    with patch.dict(sys.modules, modules):
        return build_optimizer(weights, CONFIG.model_copy(update={"implementation": "apex"}), CUDA)


class Kernels:
    """What DeepSpeed's builder compiles, for a CPU."""

    def load(self) -> "Kernels":
        return self

    @staticmethod
    @torch.no_grad()
    def multi_tensor_adam(
        _chunk: int, _overflow: Tensor, lists: Any, lr: float, beta1: float, beta2: float, *rest: Any
    ) -> None:
        eps, step, _mode, _bias_correction, weight_decay = rest
        adamw_kernel(lists, lr=lr, betas=(beta1, beta2), eps=eps, step=step, weight_decay=weight_decay)


def deepspeed(weights: list[Tensor]) -> torch.optim.Optimizer:
    with patch("deepspeed.ops.adam.fused_adam.FusedAdamBuilder", Kernels):
        return build_optimizer(weights, CONFIG.model_copy(update={"implementation": "deepspeed"}), CUDA)


def torch_adamw(weights: list[Tensor]) -> torch.optim.Optimizer:
    return build_optimizer(weights, CONFIG, CPU)


def update(optimizer: torch.optim.Optimizer, weights: list[Tensor], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("build", [torch_adamw, apex, deepspeed])
def test_a_restored_optimizer_continues_exactly(
    build: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> None:
    weights = [torch.ones(3), torch.ones(2, 2)]
    optimizer = build(weights)
    for weight in weights:
        set_moments(optimizer, weight, torch.zeros_like(weight), torch.zeros_like(weight))
    update(optimizer, weights, range(3))

    later = [weight.clone() for weight in weights]
    restored = build(later)
    for weight, source in zip(later, weights, strict=True):
        saved = optimizer.state[source]
        set_moments(restored, weight, saved["exp_avg"].clone(), saved["exp_avg_sq"].clone())
    set_updates(restored, later, 3)

    update(optimizer, weights, range(3, 6))
    update(restored, later, range(3, 6))
    assert all(torch.equal(got, expected) for got, expected in zip(later, weights, strict=True))

    exact = [torch.ones(3), torch.ones(2, 2)]
    update(torch.optim.AdamW(exact, lr=0.1, weight_decay=0.1), exact, range(6))
    torch.testing.assert_close(later, exact)


def test_a_replayed_step_starts_from_its_own_count() -> None:
    weights = [torch.ones(3)]
    optimizer = apex(weights)
    set_moments(optimizer, weights[0], torch.zeros(3), torch.zeros(3))
    update(optimizer, weights, range(5))
    set_updates(optimizer, weights, 2)
    update(optimizer, weights, range(1))
    assert optimizer.param_groups[0]["step"] == 3


def test_apex_without_its_cuda_extensions() -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    with (
        patch.object(ApexFusedAdam, "__init__", refuse),
        pytest.raises(DeviceError, match=r"apex cannot load .*requires cuda extensions\); build NVIDIA apex"),
    ):
        apex([torch.ones(3)])


def test_apex_is_not_installed() -> None:
    config = CONFIG.model_copy(update={"implementation": "apex"})
    with (
        patch.dict(sys.modules, {"apex": None}),
        pytest.raises(DeviceError, match=r"apex cannot load .*; build NVIDIA apex .*, or use torch"),
    ):
        build_optimizer([torch.ones(3)], config, CUDA)


def test_deepspeed_without_nvcc(tmp_path: Any) -> None:
    """DeepSpeed's own builder, in a process of its own because it keeps what it found out about CUDA."""
    script = """
from unittest.mock import patch
import deepspeed.ops.adam.fused_adam
import torch
from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder
from dit_scale.config import OptimizerConfig
from dit_scale.errors import DeviceError
from dit_scale.train.optim import build_optimizer

with patch("deepspeed.ops.adam.fused_adam.FusedAdamBuilder", FusedAdamBuilder):
    try:
        build_optimizer([torch.ones(3)], OptimizerConfig(implementation="deepspeed"), torch.device("cuda"))
    except DeviceError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    said = done.stdout.splitlines()[-1]
    print(said)
    assert "optimizer.implementation=deepspeed cannot load its CUDA kernels" in said
    assert "install ninja and the CUDA toolkit of the version that torch uses" in said


@pytest.mark.parametrize(
    ("installed", "lack"),
    [(False, "triton is not installed"), (True, "triton needs a C compiler: install gcc, or set CC")],
)
def test_triton_cannot_compile(monkeypatch: pytest.MonkeyPatch, installed: bool, lack: str) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: name if installed else None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    kernels.missing.cache_clear()
    try:
        with pytest.raises(DeviceError, match=f"implementation=triton: {lack}; or use torch"):
            build_optimizer([torch.ones(3)], CONFIG.model_copy(update={"implementation": "triton"}), CUDA)
    finally:
        kernels.missing.cache_clear()


@pytest.mark.parametrize("implementation", ["triton", "apex", "deepspeed"])
def test_the_fused_kernels_need_cuda(implementation: str) -> None:
    config = CONFIG.model_copy(update={"implementation": implementation})
    with pytest.raises(DeviceError, match=f"{implementation} needs CUDA, but the device is cpu; use torch"):
        build_optimizer([torch.ones(3)], config, CPU)
