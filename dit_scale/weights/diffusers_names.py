"""Convert parameter names to and from those of diffusers' DiTTransformer2DModel."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dit_scale.errors import WeightsError
from dit_scale.models.embeddings import sincos_pos_embed
from dit_scale.models.zoo import Shape
from dit_scale.weights.wrappers import StateDict


def to_diffusers(state: Mapping[str, Tensor], shape: Shape) -> StateDict:
    """Convert published names to those of diffusers' DiTTransformer2DModel.

    diffusers splits qkv in three, has copies of the timestep and class embedders in every block, and computes
    the position embedding itself. The weights are interchangeable, but the models differ slightly: diffusers'
    timestep frequencies are 10000**(-i / 127), those of the paper's code are 10000**(-i / 128). Raises
    WeightsError for other conditioning than adaLN-Zero, or a missing tensor.
    """
    _require_adaln_zero(shape)
    out: StateDict = {}
    for name, copies in _renamed(shape.depth):
        tensor = _take(state, name)
        for index, copy in enumerate(copies):
            out[copy] = tensor if index == 0 else tensor.clone()
    for name, parts in _split(shape.depth):
        out.update(zip(parts, _take(state, name).chunk(3), strict=True))
    return out


def from_diffusers(state: Mapping[str, Tensor], shape: Shape) -> StateDict:
    """Convert names of diffusers' DiTTransformer2DModel to the published names; inverse of `to_diffusers`.

    Raises WeightsError if the embedders of two blocks differ, because such a model has no published form, and
    for other conditioning than adaLN-Zero or tensors that do not match the shape.
    """
    _require_adaln_zero(shape)
    out = {"pos_embed": sincos_pos_embed(shape.width, shape.grid)}
    num_read = 0
    for name, copies in _renamed(shape.depth):
        tensors = [_take(state, copy) for copy in copies]
        for copy, tensor in zip(copies, tensors, strict=True):
            if not torch.equal(tensor, tensors[0]):
                raise WeightsError(
                    f"{copy} differs from {copies[0]}; expected the same embedder in all blocks"
                )
        out[name] = tensors[0]
        num_read += len(copies)
    for name, parts in _split(shape.depth):
        out[name] = torch.cat([_take(state, part) for part in parts])
        num_read += len(parts)
    if num_read != len(state):
        raise WeightsError(
            f"expected {num_read} tensors of a DiTTransformer2DModel with {shape.depth} blocks "
            f"({shape.name}), got {len(state)}"
        )
    return out


def _require_adaln_zero(shape: Shape) -> None:
    if shape.conditioning != "adaln_zero":
        raise WeightsError(f"diffusers supports only conditioning adaln_zero, got {shape.conditioning!r}")


def _take(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise WeightsError(
            f"missing tensor {name!r} among {len(state)} tensors; check the model name and conditioning"
        )
    return state[name]


def _renamed(depth: int) -> Iterator[tuple[str, list[str]]]:
    """Yield each published name and its copies in diffusers, for all tensors except qkv."""
    outside = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    embedders = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.embedding_table": "class_embedder.embedding_table",
    }
    inside = {
        "attn.proj": "attn1.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "adaLN_modulation.1": "norm1.linear",
    }
    layers = {ours: [theirs] for ours, theirs in outside.items()}
    for ours, theirs in embedders.items():
        layers[ours] = [f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(depth)]
    for i in range(depth):
        for ours, theirs in inside.items():
            layers[f"blocks.{i}.{ours}"] = [f"transformer_blocks.{i}.{theirs}"]
    for ours, copies in layers.items():
        yield f"{ours}.weight", [f"{copy}.weight" for copy in copies]
        if ours != "y_embedder.embedding_table":  # a table has no bias
            yield f"{ours}.bias", [f"{copy}.bias" for copy in copies]


def _split(depth: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the published name of each packed qkv tensor and its three parts in diffusers."""
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = [f"transformer_blocks.{i}.attn1.{part}.{kind}" for part in ("to_q", "to_k", "to_v")]
            yield f"blocks.{i}.attn.qkv.{kind}", parts
