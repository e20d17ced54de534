"""What a micro-batch keeps for its backward pass, and what the backward pass needs on top, in bytes.

The unit is a width: one element per token and channel of the model. The numbers of widths are counted from
the model's tensors (`tests/unit/test_activations.py` counts them again): every storage once, without
parameters. A block of adaLN-Zero keeps, for example, 20 widths: the inputs of its two residual branches (2),
normalized (2) and modulated (2) tokens, q, k and v (3), the output of attention (1), the hidden layer of the
MLP before and after GELU (8), and the results of both branches, which the gradients of the gates need (2).
torch.compile recomputes normalized and modulated tokens where the inputs of their matrix products are enough.

The counts are those of the kernels on CUDA. On a CPU, attention in bf16 keeps about 5 widths more, because it
computes in fp32.
"""

from typing import NamedTuple

from dit_scale.config import EngineConfig
from dit_scale.models.zoo import Conditioning, Shape

FORWARD_WIDTHS = 11
"""Peak of a forward pass without gradients, which includes the MLP's hidden layer twice (8)."""

_LOSS_LATENTS = 12
"""fp32 tensors of the latents' size that the loss keeps."""
_BACKWARD_WIDTHS = 4
"""What the backward pass of a block needs beyond what the forward pass kept; it frees as it goes."""


class _Kept(NamedTuple):
    """Widths that a block keeps for its backward pass, in eager mode and compiled."""

    eager: int
    compiled_bf16: int
    compiled_fp32: int
    selective: int
    compiled_selective: int


_KEPT: dict[Conditioning, _Kept] = {
    "adaln_zero": _Kept(20, 17, 17, 11, 11),
    "adaln": _Kept(18, 16, 16, 11, 10),
    "cross_attention": _Kept(20, 20, 17, 14, 13),
    "in_context": _Kept(16, 16, 14, 11, 10),
}


def element_bytes(engine: EngineConfig) -> int:
    """Bytes of a weight or activation; fp32 for a precision that is not known yet."""
    return 2 if engine.precision == "bf16" else 4


def kept_bytes(shape: Shape, engine: EngineConfig, micro_batch: int) -> int:
    """Bytes that a forward pass and its loss keep for the backward pass."""
    element, tokens = element_bytes(engine), shape.tokens + shape.extra_tokens
    per_token = element * shape.width * _widths(shape, engine)
    if engine.activation_checkpointing != "block":
        per_token += _statistics(shape)
        per_token += element * shape.width * _conditioning_vectors(shape) // tokens
    # The final layer keeps the last block's tokens, normalized tokens and, with adaLN, modulated tokens; the
    # output exists in the weights' type and in fp32.
    outside = element * shape.width * (3 if shape.modulation_chunks else 2)
    outside += (element + 4) * 2 * shape.patch_channels
    return micro_batch * (tokens * (shape.depth * per_token + outside) + loss_bytes(shape))


def loss_bytes(shape: Shape) -> int:
    """Bytes that the loss of a sample keeps."""
    return 4 * _LOSS_LATENTS * shape.in_channels * shape.latent_size**2


def backward_bytes(shape: Shape, engine: EngineConfig, micro_batch: int) -> int:
    """Bytes that the backward pass of the last block needs on top: gradients, and what it recomputes."""
    tokens = micro_batch * (shape.tokens + shape.extra_tokens)
    recomputed = _KEPT[shape.conditioning].eager - _widths(shape, engine)
    if engine.activation_checkpointing == "none":
        recomputed = 0
    return element_bytes(engine) * shape.width * tokens * (recomputed + _BACKWARD_WIDTHS)


def forward_bytes(shape: Shape, engine: EngineConfig, samples: int) -> int:
    """Peak of a forward pass without gradients, in bytes."""
    tokens = samples * (shape.tokens + shape.extra_tokens)
    return element_bytes(engine) * shape.width * tokens * FORWARD_WIDTHS


def _widths(shape: Shape, engine: EngineConfig) -> int:
    kept, compiled = _KEPT[shape.conditioning], engine.compile_blocks
    if engine.activation_checkpointing == "block":
        return 1
    if engine.activation_checkpointing == "selective":
        return kept.compiled_selective if compiled else kept.selective
    if not compiled:
        return kept.eager
    return kept.compiled_bf16 if engine.precision == "bf16" else kept.compiled_fp32


def _statistics(shape: Shape) -> int:
    """fp32 bytes per token: mean and deviation of every LayerNorm, log-sum-exp of every attention."""
    cross = int(shape.conditioning == "cross_attention")
    return 4 * (2 * (2 + cross) + shape.heads * (1 + cross))


def _conditioning_vectors(shape: Shape) -> int:
    """Vectors of the model's width per sample and block: modulation with its terms, or keys and values."""
    chunks = shape.modulation_chunks
    return chunks + 3 if chunks else 4 * int(shape.conditioning == "cross_attention")
