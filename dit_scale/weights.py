"""Read, check and write weights files, and convert parameter names to and from diffusers.

`read` accepts a safetensors file, or a `.pt` file with a flat state dict (the published DiT weights) or with
a training checkpoint of the published code; it never executes code from a file. `write` creates an fp32
safetensors file. Parameter names are the published ones, as in `dit_scale.models.dit.DiT`; `to_diffusers`
and `from_diffusers` convert to and from diffusers' DiTTransformer2DModel.
"""

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_scale.errors import StorageError, WeightsError
from dit_scale.models.embeddings import sincos_pos_embed
from dit_scale.models.zoo import Shape
from dit_scale.storage.outputs import new_file

StateDict = dict[str, Tensor]

_NUM_NAMED = 3
"""Maximum number of tensors that an error names per problem; a wrong model has hundreds."""


def read(path: str | Path) -> StateDict:
    """Read the tensors of a weights file by name, on the CPU and in their stored type.

    From a training checkpoint with "model", "ema" and "opt" it reads "ema". Raises WeightsError if the file
    is missing, damaged, of another format, or cannot be read without executing code from it.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".pt":
        return _tensors_of(_read_pickle(path), path)
    raise WeightsError(f"{path}: expected a .safetensors or .pt file, got {path.suffix or 'no suffix'}")


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty if it has none, and for a `.pt` file."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is damaged or not a safetensors file ({error}); download it again"
        ) from None


def _read_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is damaged or not a safetensors file ({error}); download it again"
        ) from None


def _read_pickle(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Memory-mapped if the format allows it, so "model" and "opt" of a checkpoint are never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise WeightsError(f"{path} is damaged or not a torch.save file; download it again") from error
        raise WeightsError(
            f"{path}: expected only tensors, got {foreign[1]}, which cannot be read without executing code "
            "from the file; save only the state dict, preferably as safetensors"
        ) from None


def _tensors_of(content: object, path: Path) -> StateDict:
    if isinstance(content, dict) and isinstance(content.get("ema"), dict):
        content = content["ema"]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{path}: expected tensors by name, got {type(content).__name__}")
    foreign = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        raise WeightsError(
            f"{path}: expected tensors by name, or a training checkpoint with 'ema'; "
            f"got {type(content[foreign[0]]).__name__} under {foreign[0]!r}"
        )
    return dict(content)


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load `state` into `model`; names and shapes must match exactly.

    A model on the meta device adopts the tensors; any other model copies them and keeps its type and device.
    Raises WeightsError that names missing and unexpected tensors and those with another shape.
    """
    own = model.state_dict()
    shapes = [
        f"{name} (got {tuple(state[name].shape)}, expected {tuple(tensor.shape)})"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:_NUM_NAMED])}{', ...' if len(names) > _NUM_NAMED else ''}"
        for kind, names in (
            ("missing", [name for name in own if name not in state]),
            ("unexpected", [name for name in state if name not in own]),
            ("with another shape", shapes),
        )
        if names
    ]
    if problems:
        raise WeightsError(
            f"weights do not match the model; {'; '.join(problems)}; "
            "model name, image size, conditioning and number of classes must be those of the training run"
        )
    model.load_state_dict(state, strict=True, assign=any(tensor.is_meta for tensor in own.values()))


def write(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write tensors as fp32 safetensors, atomically. Raises StorageError if they cannot be written."""
    tensors = {name: x.detach().to("cpu", torch.float32).contiguous() for name, x in state.items()}
    with new_file(Path(path)) as temporary:
        try:
            save_file(tensors, temporary, metadata=dict(metadata))
        except SafetensorError as error:  # also raised when the disk is full
            raise StorageError(f"cannot write {path}: {error}; an existing file is unchanged") from None


def digest(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Compute the SHA-256 of tensors and metadata, to store in a safetensors file's metadata."""
    sha256 = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        sha256.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha256.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


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
