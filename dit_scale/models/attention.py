"""Attention backends. A model looks one up by name when it is built; only this module imports kernels.

Every backend maps (q_BHTK, k_BHTK, v_BHTK) => o_BHTK and computes softmax(q k^T K**-0.5) v, without mask
or dropout (Vaswani et al. 2017, eq. 1). The number of keys may differ from the number of queries. `sdpa`
needs only torch; the flash backends need their own package, a CUDA device and bf16 weights. A model
records its backend as `attention_backend`.

Shapes: B batch, H heads, T tokens, K channels per head.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_scale.errors import ConfigError, DeviceError

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

_SDPA_KERNELS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
_CUDA_ONLY = ("sdpa_efficient", "sdpa_cudnn")

_FLASH_PACKAGES = {
    "flash2": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash3": (
        "flash_attn_interface",
        "build the folder `hopper` of https://github.com/Dao-AILab/flash-attention (Hopper GPUs only)",
    ),
    "flash4": ("flash_attn.cute", "pip install flash-attn-4"),
}

BACKENDS = ("sdpa", *_SDPA_KERNELS, *_FLASH_PACKAGES)
"""Backend names. `sdpa` lets torch choose a kernel; `sdpa_*` pin one of torch's kernels."""


def choose(name: str) -> AttentionFunction:
    """Return the attention function of the backend called `name`.

    Raises ConfigError for an unknown name, and DeviceError for a backend that this machine cannot run.
    """
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention backend {name!r}; expected one of {', '.join(BACKENDS)}")
    if name == "sdpa":
        return F.scaled_dot_product_attention
    if name in _FLASH_PACKAGES:
        package, advice = _FLASH_PACKAGES[name]
        try:
            kernel = importlib.import_module(package).flash_attn_func
        except ImportError as error:
            raise DeviceError(
                f"attention backend {name!r} needs the package {package}, which cannot be imported "
                f"({error}); {advice}, or use attention: sdpa"
            ) from None
        _require_cuda(name)
        return partial(_flash, kernel)
    if name in _CUDA_ONLY:
        _require_cuda(name)
    return partial(_sdpa_pinned, _SDPA_KERNELS[name])


def _require_cuda(name: str) -> None:
    if not torch.cuda.is_available():
        raise DeviceError(
            f"attention backend {name!r} needs a CUDA device, but none is available; use attention: sdpa"
        )


def _sdpa_pinned(kernel: SDPBackend, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK)


def _flash(kernel: Callable[..., Any], q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    # These packages expect (B, T, H, K). Their backward pass is deterministic only on request; torch's
    # global switch decides, as it does for torch's own kernels.
    q_BTHK, k_BTHK, v_BTHK = (x.transpose(1, 2) for x in (q_BHTK, k_BHTK, v_BHTK))
    out = kernel(q_BTHK, k_BTHK, v_BTHK, deterministic=torch.are_deterministic_algorithms_enabled())
    # Some releases return (output, log-sum-exp), others only the output.
    o_BTHK = out[0] if isinstance(out, tuple) else out
    return o_BTHK.transpose(1, 2)
