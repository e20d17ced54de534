"""Reading checkpoints at any world size and any ZeRO stage, and filling in what a rank owns.

A reader trusts only manifests, newest first (`attempts.committed`). It reads the byte ranges that it needs
and verifies their blocks; if anything is wrong, its caller falls back to the checkpoint before.
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
from dit_scale.checkpoint.slices import StoredSlice
from dit_scale.config import TrainConfig
from dit_scale.errors import CheckpointError
from dit_scale.storage import Storage

ReadSlice = Callable[[str, str, int, int], Tensor]
"""(kind, parameter, start, length) => fp32 tensor of `length` elements."""


class Checkpoint:
    """A committed checkpoint in a folder of a storage.

    Raises CheckpointError that names the object and the tensor if anything is damaged or missing.
    """

    def __init__(self, storage: Storage, checkpoint_id: CheckpointId, folder: str = CHECKPOINTS) -> None:
        self.storage, self.path = storage, checkpoint_id.path(folder)
        self.manifest = read_manifest(storage, checkpoint_id, folder)
        self._slices: dict[tuple[str, str], list[tuple[FileRecord, StoredSlice]]] = {}
        for file in self.manifest.files:
            for stored in rankfile.open_file(storage, self.path, file):
                self._slices.setdefault((stored.kind, stored.parameter), []).append((file, stored))

    def __str__(self) -> str:
        return f"{self.storage.url}/{self.path}"

    @property
    def id(self) -> CheckpointId:
        return self.manifest.id

    @property
    def bytes(self) -> int:
        """Size of all rank files."""
        return sum(file.bytes for file in self.manifest.files)

    @cached_property
    def config(self) -> TrainConfig:
        """Configuration of the run that wrote the checkpoint."""
        try:
            return TrainConfig.model_validate(self.manifest.config)
        except ValidationError as error:
            raise CheckpointError(f"{self} was written by another version of this program: {error}") from None

    def kinds(self) -> set[str]:
        """Return the kinds of state in the checkpoint."""
        return {kind for kind, _ in self._slices}

    def read(self, kind: str, parameter: str, start: int, length: int) -> Tensor:
        """Read elements [start, start + length) of a flattened parameter, fp32, verifying every block."""
        out = np.empty(length, dtype="<f4")
        filled = 0
        for file, stored in self._slices.get((kind, parameter), ()):
            low, high = max(start, stored.start), min(start + length, stored.start + stored.length)
            if low < high:
                key = f"{self.path}/{file.key}"
                out[low - start : high - start] = rankfile.read(
                    self.storage, key, stored, low - stored.start, high - low
                )
                filled += high - low
        if filled != length:
            raise CheckpointError(f"{self}: {kind} of {parameter} has {filled} of {length} elements")
        return torch.from_numpy(out)

    def read_whole(self, kind: str) -> dict[str, Tensor]:
        """Read every parameter of a kind in its full shape, by name."""
        shapes = self.manifest.model_shapes
        return {
            name: self.read(kind, name, 0, int(np.prod(shape, dtype=np.int64))).reshape(shape)
            for name, shape in shapes.items()
        }

    def verify(self) -> None:
        """Read every byte, and check that every kind has all elements of every parameter exactly once."""
        for file in self.manifest.files:
            rankfile.verify(self.storage, self.path, file)
        for kind in self.kinds():
            for parameter, shape in self.manifest.model_shapes.items():
                slices = [stored for _, stored in self._slices.get((kind, parameter), ())]
                end = 0
                for stored in sorted(slices, key=lambda stored: stored.start):
                    end = end + stored.length if stored.start == end else -1
                if end != int(np.prod(shape, dtype=np.int64)):
                    raise CheckpointError(f"{self}: {kind} of {parameter} has missing or overlapping slices")


def fill(owned: Iterable[Partition], kinds: Iterable[str], read: ReadSlice) -> None:
    """Copy these kinds of state into the flat buffers that this rank owns."""
    wanted = tuple(kinds)
    for partition in owned:
        for kind in wanted:
            buffer = partition.buffers[kind].detach()
            for slice_ in partition.slices:
                values = read(kind, slice_.parameter, slice_.start, slice_.length)
                buffer[slice_.offset : slice_.offset + slice_.length].copy_(values)
