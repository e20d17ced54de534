"""Attention backends. A model looks one up by name when it is built; only this module imports kernels.

Every backend maps (q_BHTK, k_BHTK, v_BHTK) => o_BHTK and computes softmax(q k^T K**-0.5) v, without mask
or dropout (Vaswani et al. 2017, eq. 1). The number of keys may differ from the number of queries. `sdpa`
needs only torch; in bf16 on a CPU, it computes in fp32. The flash backends need their own package, a CUDA
device and bf16 weights. A model records its backend as `attention_backend`.

`flash3` and `flash4` stay torch's own operator: torch replaces the kernel behind its flash backend, in the
entire process. So torch.compile sees one operator, and torch's determinism switch decides about the backward
pass.

Shapes: B batch, H heads, T tokens, K channels per head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from dit_scale.choices import ATTENTION_BACKENDS as BACKENDS
from dit_scale.errors import ConfigError, DeviceError

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

_SDPA_KERNELS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
_CUDA_ONLY = ("sdpa_efficient", "sdpa_cudnn")
_TORCH_FLASH = {"flash3": "FA3", "flash4": "FA4"}
"""Backend => the implementation that torch activates for it."""
_ADVICE = {
    "flash2": "pip install flash-attn --no-build-isolation",
    "flash3": "build the folder `hopper` of https://github.com/Dao-AILab/flash-attention (Hopper GPUs only)",
    # Every usable version is a pre-release, which pip ignores unless it is named. From 4.0.0b19 on,
    # the function that torch 2.13 calls returns more values than torch expects.
    "flash4": 'pip install "flash-attn-4==4.0.0b18" (Hopper and Blackwell GPUs only)',
}


def choose(name: str) -> AttentionFunction:
    """Return the attention function of the backend called `name`.

    Raises ConfigError for an unknown name, and DeviceError for a backend that this machine cannot run.
    """
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention backend {name!r}; expected one of {', '.join(BACKENDS)}")
    if name == "sdpa":
        return _sdpa
    if name in _ADVICE:
        attend = _import_flash(name)
        _require_cuda(name)
        require_working(name, attend, torch.device("cuda"))
        return attend
    if name in _CUDA_ONLY:
        _require_cuda(name)
    return partial(_sdpa_pinned, _SDPA_KERNELS[name])


def require_working(name: str, attend: AttentionFunction, device: torch.device) -> None:
    """Run the backend once on a tiny bf16 input. Raises DeviceError if its kernel cannot run on the device.

    A package can be installed and still not fit the GPU or this version of torch.
    """
    x_BHTK = torch.zeros(1, 1, 16, 64, dtype=torch.bfloat16, device=device)
    try:
        attend(x_BHTK, x_BHTK, x_BHTK)
    except Exception as error:  # whatever a package of another version raises
        advice = f"expected: {_ADVICE[name]}; " if name in _ADVICE else ""
        raise DeviceError(
            f"attention backend {name!r} does not run on this {device.type} device ({error}); "
            f"{advice}or use attention: sdpa"
        ) from error


def _import_flash(name: str) -> AttentionFunction:
    try:
        if name in _TORCH_FLASH:
            activate_flash_attention_impl(_TORCH_FLASH[name])
            return partial(_sdpa_pinned, SDPBackend.FLASH_ATTENTION)
        from flash_attn import flash_attn_func
    # torch raises RuntimeError when a module of the right name lacks the kernels.
    except (ImportError, RuntimeError) as error:
        raise DeviceError(
            f"attention backend {name!r} needs a package that cannot be imported ({error}): {_ADVICE[name]}, "
            "or use attention: sdpa"
        ) from None
    return partial(_flash2, flash_attn_func)


def _require_cuda(name: str) -> None:
    if not torch.cuda.is_available():
        raise DeviceError(
            f"attention backend {name!r} needs a CUDA device, but none is available; use attention: sdpa"
        )


def _sdpa(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    if q_BHTK.device.type == "cpu" and q_BHTK.dtype == torch.bfloat16:
        # The backward pass of torch's bf16 kernel for CPUs takes up to ten times as long as that for fp32.
        q_BHTK, k_BHTK, v_BHTK = q_BHTK.float(), k_BHTK.float(), v_BHTK.float()
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK).bfloat16()
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK)


def _sdpa_pinned(kernel: SDPBackend, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK)


def _flash2(kernel: Callable[..., Any], q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    # The package expects (B, T, H, K). Its backward pass is deterministic only on request; torch's global
    # switch decides, as it does for torch's own kernels.
    q_BTHK, k_BTHK, v_BTHK = (x.transpose(1, 2) for x in (q_BHTK, k_BHTK, v_BHTK))
    o_BTHK: Tensor = kernel(
        q_BTHK, k_BTHK, v_BTHK, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    return o_BTHK.transpose(1, 2)
