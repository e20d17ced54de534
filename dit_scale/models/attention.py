"""The one door to attention kernels: a backend is chosen by name, once, when a model is built.

Shapes: B batch, H heads, T tokens, K channels of one head. Every backend is a function of
(q_BHTK, k_BHTK, v_BHTK) => o_BHTK: softmax(q k^T K**-0.5) v, no mask, no dropout. Keys and values
may be fewer than queries. `sdpa` needs nothing but torch; the flash backends need their own packages,
a CUDA device and bf16 weights. The choice is logged, and the model carries it as `attention_backend`.
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
"""Names that `choose` knows; `sdpa` lets torch pick a kernel, `sdpa_*` pin one of torch's."""


def choose(name: str) -> AttentionFunction:
    """The attention function called `name`, announced in the log.

    Raises ConfigError for an unknown name and DeviceError for a backend that this machine lacks.
    """
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return _resolve(name)


def _resolve(name: str) -> AttentionFunction:
    if name == "sdpa":
        return F.scaled_dot_product_attention
    if name in _FLASH_PACKAGES:
        package, advice = _FLASH_PACKAGES[name]
        try:
            kernel = importlib.import_module(package).flash_attn_func
        except ImportError as error:
            raise DeviceError(
                f"attention backend {name!r} needs the package {package}, which does not import here "
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
            f"attention backend {name!r} needs a CUDA device and there is none; use attention: sdpa"
        )


def _sdpa_pinned(kernel: SDPBackend, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK)


def _flash(kernel: Callable[..., Any], q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    # The packages take (B, T, H, K). Their backward pass adds in a fixed order only when told to;
    # torch's own switch decides, as it does for torch's kernels.
    q_BTHK, k_BTHK, v_BTHK = (x.transpose(1, 2) for x in (q_BHTK, k_BHTK, v_BHTK))
    out = kernel(q_BTHK, k_BTHK, v_BTHK, deterministic=torch.are_deterministic_algorithms_enabled())
    # Some releases return (output, log-sum-exp), others the output alone.
    o_BTHK = out[0] if isinstance(out, tuple) else out
    return o_BTHK.transpose(1, 2)
