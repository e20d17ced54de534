"""Read and write weights files.

`read` accepts safetensors files, the index of sharded ones, and files of torch.save, in every wrapper that
`wrappers` knows; it never executes code from a file. `write` creates an fp32 safetensors file, `write_pt` a
flat state dict like the published DiT weights.
"""

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_scale.errors import StorageError, WeightsError
from dit_scale.storage.outputs import new_file
from dit_scale.weights.wrappers import EMA, StateDict, unwrap

INDEX_SUFFIX = ".safetensors.index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
DIGEST = "dit_scale_sha256"
"""Metadata key of a safetensors file of ours: the SHA-256 of everything else in the file."""
SUFFIXES = (".safetensors", INDEX_SUFFIX, *TORCH_SUFFIXES)


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of a file by their published names, fp32 on the CPU."""

    path: Path
    tensors: StateDict
    keys: tuple[str, ...] = ()
    """Keys that led to the tensors, outermost first."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of a safetensors file, without the digest."""

    def __str__(self) -> str:
        if not self.keys:
            return str(self.path)
        found = f"{self.path} (weights under {' / '.join(map(repr, self.keys))}"
        return f"{found})" if EMA in self.keys else f"{found}; the file has no EMA)"


def read(path: str | Path) -> StateDict:
    """Read the tensors of a weights file by name; see `read_file`."""
    return read_file(path).tensors


def read_file(path: str | Path) -> WeightsFile:
    """Read a .safetensors file, the index of a sharded one, or a .pt, .pth, .ckpt or .bin file.

    From a training checkpoint it reads "ema" if there is one, else "model". Half precision becomes fp32.
    Raises WeightsError if the file is missing, damaged or of another format, or cannot be read without
    executing code from it.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}")
    content: object
    metadata: dict[str, str] = {}
    if path.name.endswith(INDEX_SUFFIX):
        content = _read_shards(path)
    elif path.suffix == ".safetensors":
        content, metadata = _read_safetensors(path), read_metadata(path)
        if (expected := metadata.pop(DIGEST, "")) and expected != digest(content, metadata):
            raise WeightsError(f"{path} is damaged (SHA-256 mismatch); download or export it again")
    elif path.suffix in TORCH_SUFFIXES:
        content = _read_pickle(path)
    else:
        *most, last = SUFFIXES
        raise WeightsError(
            f"{path}: expected a file that ends in {', '.join(most)} or {last}, "
            f"got {path.suffix or 'no suffix'}"
        )
    found = unwrap(content, str(path))
    tensors = {name: _fp32(tensor) for name, tensor in found.tensors.items()}
    return WeightsFile(path, tensors, found.keys, metadata)


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty if it has none, and for any other file."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise _damaged_safetensors(path, error) from None


def _read_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged_safetensors(path, error) from None


def _damaged_safetensors(path: str | Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path} is damaged or not a safetensors file ({error}); download it again")


def _read_shards(index: Path) -> StateDict:
    """Read the shards that an index names; each must hold exactly the tensors that the index says."""
    shard_of = _read_index(index)
    tensors: StateDict = {}
    for shard in sorted(set(shard_of.values())):
        path = index.parent / shard
        if not path.is_file():
            raise WeightsError(f"{index} names the shard {shard}, which is missing; download it to {path}")
        content = _read_safetensors(path)
        expected = {name for name, where in shard_of.items() if where == shard}
        if missing := sorted(expected - content.keys()):
            raise WeightsError(f"{path} has no tensor {missing[0]!r}, which {index.name} expects there")
        if others := sorted(content.keys() - expected):
            elsewhere = shard_of.get(others[0], "no shard")
            raise WeightsError(
                f"{path} holds the tensor {others[0]!r}, which {index.name} expects in {elsewhere}"
            )
        tensors |= content
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Return the shard of each tensor."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise WeightsError(f"{index} names {twice[0]!r} twice; expected each tensor once")
        return dict(pairs)

    try:
        content = json.loads(index.read_text(), object_pairs_hook=unique)
    except ValueError as error:
        raise WeightsError(f"{index} is not JSON: {error}; download it again") from None
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise WeightsError(f"{index}: expected a weight_map from tensors to shards")
    for name, shard in shard_of.items():
        # Nothing outside the folder is read, whatever a foreign index says.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise WeightsError(
                f"{index}: tensor {name!r} is in {shard!r}; expected the name of a .safetensors file beside "
                "the index"
            )
    return dict(shard_of)


def _read_pickle(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Memory-mapped if the format allows it, so "model" and "opt" of a checkpoint are never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise WeightsError(f"{path} is damaged or not a torch.save file; download it again") from error
        raise WeightsError(
            f"{path}: expected only tensors, got {foreign[1]}, which cannot be read without executing code "
            "from the file; save only the state dict, preferably as safetensors"
        ) from None


def write(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write tensors as fp32 safetensors, atomically. Raises StorageError if they cannot be written."""
    with new_file(Path(path)) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(_for_writing(state), temporary, metadata=dict(metadata))
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
        except SafetensorError as error:  # also raised when the disk is full
            raise _unwritten(path, error) from None


def write_pt(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors as a flat fp32 state dict of torch.save, atomically, like the published DiT weights.

    Raises StorageError if they cannot be written.
    """
    with new_file(Path(path)) as temporary, temporary.open("wb") as file:
        try:
            # An open file, because torch.save would write a path's name, which is random, into the file.
            torch.save(_for_writing(state), file)
        except RuntimeError as error:  # torch's writer replaces the error of a full disk
            raise _unwritten(path, error) from None


def _for_writing(state: Mapping[str, Tensor]) -> StateDict:
    return {name: x.detach().to("cpu", torch.float32).contiguous() for name, x in state.items()}


def _unwritten(path: str | Path, error: Exception) -> StorageError:
    return StorageError(f"cannot write {path}: {error}; an existing file is unchanged")


def with_digest(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Add the digest of fp32 tensors and metadata to the metadata, for `write`; `read_file` verifies it."""
    return {**metadata, DIGEST: digest(state, metadata)}


def digest(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Compute the SHA-256 of tensors and metadata."""
    sha256 = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        sha256.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha256.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
