"""What `determinism: strict` pins, before the first kernel runs (docs/determinism.md)."""

import os

import torch

from dit_scale.config import EngineConfig


def pin(config: EngineConfig) -> None:
    """Make equal inputs give equal bits at the same world size; does nothing for `determinism: fast`."""
    if config.determinism == "fast":
        return
    # Each library reads its variable once, when it starts. A value from the environment stays.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    if config.compile_blocks:
        torch.use_deterministic_algorithms(True)  # also informs torch's compiler, so it imports it: 1.2 s
    else:
        torch.set_deterministic_debug_mode("error")  # the same without the compiler
    # Deterministic mode fills every new buffer by default, including ZeRO's buckets of 100 MB and more in
    # each backward pass.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, also in the patch embedding
