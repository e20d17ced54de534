"""AdamW as configured, the gate before its updates, and the learning rate as a function of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit_scale import kernels
from dit_scale.config import OptimizerConfig
from dit_scale.errors import DeviceError


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step (counted from 0) in a run of `num_steps`.

    Warm-up is linear and reaches `lr` at its last step; without warm-up the first step has `lr`. After that
    the rate is constant, or decays linearly or by a half cosine to `final_lr_fraction * lr` at the last step
    of the run.
    """
    at_peak = max(1, config.warmup_steps)
    if config.decay == "none" or step < at_peak:
        return config.lr * min(1.0, (step + 1) / at_peak)
    progress = min(1.0, (step + 1 - at_peak) / max(1, num_steps - at_peak))
    above = 1.0 - progress if config.decay == "linear" else (1.0 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * above)


def build_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters.

    Raises DeviceError when the configured implementation is unavailable: apex and DeepSpeed's fused kernels
    need CUDA, and apex must be NVIDIA's (the package of that name on PyPI is unrelated).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.implementation == "torch":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    if device.type != "cuda":
        raise DeviceError(
            f"optimizer.implementation={config.implementation} needs CUDA, but the device is "
            f"{device.type}; use torch"
        )
    if config.implementation == "triton":
        if lack := kernels.missing():
            raise DeviceError(f"optimizer.implementation=triton: {lack}; or use torch")
        from dit_scale.kernels.adamw import TritonAdamW

        return TritonAdamW(parameters, **settings)
    if config.implementation == "deepspeed":
        from deepspeed.ops.adam import FusedAdam as DeepSpeedFusedAdam

        return DeepSpeedFusedAdam(parameters, adam_w_mode=True, **settings)
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        raise DeviceError(
            "optimizer.implementation=apex: NVIDIA apex with its CUDA extensions is not installed; "
            "build it from source, or use torch"
        ) from None
    optimizer: torch.optim.Optimizer = FusedAdam(parameters, adam_w_mode=True, **settings)
    return optimizer


def gate(optimizer: torch.optim.Optimizer, skip: Callable[[], Tensor]) -> None:
    """Call `skip` before every update; 1.0 skips it: masters, moments and the update count stay unchanged.

    torch's fused AdamW reads the flag, fp32 (), on the device. The kernels of apex and DeepSpeed have no such
    flag: for them the host reads it, which waits for the device in each step.
    """
    update = optimizer.step

    def step() -> None:
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = skip()  # type: ignore[attr-defined]
            update()
        elif not skip().item():
            update()

    optimizer.step = step  # type: ignore[method-assign, assignment]
