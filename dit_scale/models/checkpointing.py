"""Activation checkpointing: which activations a block keeps for its backward pass, and which it recomputes.

    none       keep all of them
    block      keep the input of the block, and run the block once more in the backward pass
    selective  keep the input and the results of matrix products and attention; recompute the rest, which is
               elementwise and cheap

Losses and gradients keep their bits, because a recomputed activation equals the first one.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "block", "selective"]
CHECKPOINTINGS: tuple[Checkpointing, ...] = get_args(Checkpointing)

RunBlock = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Runs a block on tokens and conditioning => tokens."""

_aten = torch.ops.aten
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]
"""Matrix products of linear layers, and torch's attention kernels."""


def block_runner(mode: Checkpointing) -> RunBlock:
    """Return the function that runs a block in this mode."""
    if mode == "none":
        return _run
    # Blocks draw no random numbers, so no random state has to be saved (reading CUDA's waits for the device).
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if mode == "selective":
        run = partial(run, context_fn=partial(create_selective_checkpoint_contexts, _KEPT))
    return run


def _run(block: nn.Module, x_BTD: Tensor, c: Tensor) -> Tensor:
    y_BTD: Tensor = block(x_BTD, c)
    return y_BTD
