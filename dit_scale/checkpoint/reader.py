"""Reads checkpoints, at any world size and any ZeRO stage, and fills in what a rank owns.

A reader trusts manifests only, newest first (`attempts.committed`); it reads the byte ranges that it needs,
checks their blocks, and falls back to the one before when anything does not fit.
`saver` and `writer` make checkpoints; docs/formats.md describes the files.
"""

from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from dit_scale.checkpoint import rankfile
from dit_scale.checkpoint.manifest import CHECKPOINTS, CheckpointId, FileRecord, read_manifest
from dit_scale.checkpoint.partition import Partition
from dit_scale.checkpoint.rankfile import StoredPiece
from dit_scale.config import TrainConfig
from dit_scale.errors import CheckpointError
from dit_scale.storage import Storage

ReadExtent = Callable[[str, str, int, int], Tensor]
"""(kind, parameter, start, length) => fp32 tensor of `length` elements."""


class Checkpoint:
    """A committed checkpoint: a folder below a storage.

    Raises CheckpointError, naming object and tensor, for whatever does not fit.
    """

    def __init__(self, storage: Storage, checkpoint_id: CheckpointId, folder: str = CHECKPOINTS) -> None:
        self.storage, self.path = storage, checkpoint_id.path(folder)
        self.manifest = read_manifest(storage, checkpoint_id, folder)
        self._pieces: dict[tuple[str, str], list[tuple[FileRecord, StoredPiece]]] = {}
        for file in self.manifest.files:
            for piece in rankfile.open_file(storage, self.path, file):
                self._pieces.setdefault((piece.kind, piece.parameter), []).append((file, piece))

    def __str__(self) -> str:
        return f"{self.storage.url}/{self.path}"

    @property
    def id(self) -> CheckpointId:
        return self.manifest.id

    @property
    def bytes(self) -> int:
        """Of all files beside the manifest."""
        return sum(file.bytes for file in self.manifest.files)

    @cached_property
    def config(self) -> TrainConfig:
        """The configuration of the run that wrote it."""
        try:
            return TrainConfig.model_validate(self.manifest.config)
        except ValidationError as error:
            raise CheckpointError(f"{self} is of another version of this program: {error}") from None

    def kinds(self) -> set[str]:
        """The kinds of state that it holds."""
        return {kind for kind, _ in self._pieces}

    def read(self, kind: str, parameter: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of a flattened parameter, fp32, every block checked."""
        out = np.empty(length, dtype="<f4")
        filled = 0
        for file, piece in self._pieces.get((kind, parameter), ()):
            low, high = max(start, piece.start), min(start + length, piece.start + piece.length)
            if low < high:
                key = f"{self.path}/{file.key}"
                out[low - start : high - start] = rankfile.read(
                    self.storage, key, piece, low - piece.start, high - low
                )
                filled += high - low
        if filled != length:
            raise CheckpointError(f"{self}: {kind} of {parameter} has {filled} of {length} elements")
        return torch.from_numpy(out)

    def read_whole(self, kind: str) -> dict[str, Tensor]:
        """Every parameter of a kind in its full shape, by name."""
        shapes = self.manifest.model_shapes
        return {
            name: self.read(kind, name, 0, int(np.prod(shape, dtype=np.int64))).reshape(shape)
            for name, shape in shapes.items()
        }

    def verify(self) -> None:
        """Read every byte, and see that each parameter is there whole, in every kind."""
        for file in self.manifest.files:
            rankfile.verify(self.storage, self.path, file)
        for kind in self.kinds():
            for parameter, shape in self.manifest.model_shapes.items():
                pieces = [piece for _, piece in self._pieces.get((kind, parameter), ())]
                end = 0
                for piece in sorted(pieces, key=lambda piece: piece.start):
                    end = end + piece.length if piece.start == end else -1
                if end != int(np.prod(shape, dtype=np.int64)):
                    raise CheckpointError(f"{self}: {kind} of {parameter} is not whole")


def fill(owned: Iterable[Partition], kinds: Iterable[str], read: ReadExtent) -> None:
    """Copy these kinds of state into the flat buffers that this rank owns."""
    wanted = tuple(kinds)
    for partition in owned:
        for kind in wanted:
            buffer = partition.buffers[kind].detach()
            for extent in partition.extents:
                values = read(kind, extent.parameter, extent.start, extent.length)
                buffer[extent.offset : extent.offset + extent.length].copy_(values)
