"""AdamW as configured, the gate before its updates, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

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


def build_optimizer(
    parameters: Sequence[Tensor], config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over these tensors.

    Raises DeviceError when the configured implementation is unavailable: all except torch's need CUDA, and
    apex must be NVIDIA's (the package of that name on PyPI is unrelated).
    """
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
    try:
        if config.implementation == "apex":
            from apex.optimizers import FusedAdam
        else:
            from deepspeed.ops.adam import FusedAdam
        optimizer: torch.optim.Optimizer = FusedAdam(parameters, adam_w_mode=True, **settings)
    except Exception as error:  # each compiler and loader of CUDA kernels raises exceptions of its own
        raise DeviceError(
            f"optimizer.implementation={config.implementation} cannot load its CUDA kernels "
            f"({type(error).__name__}: {error}); {_NEEDS[config.implementation]}, or use torch"
        ) from error
    return optimizer


_NEEDS = {
    "apex": "build NVIDIA apex from source with its CUDA extensions",
    "deepspeed": "install ninja and the CUDA toolkit of the version that torch uses, and set CUDA_HOME",
}


def set_moments(
    optimizer: torch.optim.Optimizer, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor
) -> None:
    """Give the optimizer the moments of a master, before its first update."""
    optimizer.state[master].update(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    set_updates(optimizer, [master], 0)


def set_updates(optimizer: torch.optim.Optimizer, masters: Iterable[Tensor], updates: int) -> None:
    """Set the number of updates so far, which corrects the bias of the moments.

    torch keeps it in a tensor for each master, DeepSpeed's FusedAdam in a number for each master, and apex in
    a number for each group. Their kernels take a number: given a tensor, they would wait for the device.
    """
    on_device = isinstance(optimizer, torch.optim.AdamW)
    for master in masters:
        step = torch.full((), float(updates), device=master.device) if on_device else updates
        optimizer.state[master]["step"] = step
    if not on_device:
        for group in optimizer.param_groups:
            group["step"] = updates


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
