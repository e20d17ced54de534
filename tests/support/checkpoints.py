"""Checkpoints written in one call by the shipped code: no run, no writer process."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dit_scale.checkpoint import rankfile
from dit_scale.checkpoint.manifest import CHECKPOINTS, CheckpointId, Manifest
from dit_scale.checkpoint.partition import Partition
from dit_scale.checkpoint.rankfile import Bytes
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.checkpoint.writer import write_manifest
from dit_scale.config import TrainConfig
from dit_scale.storage import Storage

Ranks = Sequence[Iterable[Partition]]
"""What each rank owns."""


def write(
    root: Storage, checkpoint_id: CheckpointId, ranks: Ranks, folder: str = CHECKPOINTS, **fields: Any
) -> Manifest:
    """Write the rank files and the manifest of a checkpoint below a folder of the root.

    `fields` override those of the manifest; by default the shapes are those of flat parameters.
    """
    files = tuple(write_rank(root, checkpoint_id, rank, owned, folder) for rank, owned in enumerate(ranks))
    defaults = {
        "step": checkpoint_id.step,
        "samples": 256 * checkpoint_id.step,
        "attempt": checkpoint_id.attempt,
        "config": TrainConfig().model_dump(mode="json"),
        "data_sha256": "1" * 64,
        "vae_sha256": "2" * 64,
        "model_shapes": _flat_shapes(ranks),
        "optimizer_groups": ({"lr": 1e-4, "betas": [0.9, 0.999]},),
        "written_by": {"world": len(ranks), "zero_stage": 2},
        "files": files,
    }
    manifest = Manifest.model_validate({**defaults, **fields})
    write_manifest(root, manifest, folder)
    return manifest


def write_rank(
    root: Storage,
    checkpoint_id: CheckpointId,
    rank: int,
    owned: Iterable[Partition],
    folder: str = CHECKPOINTS,
) -> rankfile.FileRecord:
    """Write the file of one rank, with all kinds that its partitions hold."""
    return rankfile.write(root, f"{checkpoint_id.path(folder)}/{rankfile.file_name(rank)}", *flat(owned))


def flat(owned: Iterable[Partition]) -> tuple[Bytes, list[tuple[str, ParameterSlice]]]:
    """Return everything that a rank owns as one flat array, and the layout of the array."""
    values, slices, first = [np.empty(0, np.float32)], list[tuple[str, ParameterSlice]](), 0
    for partition in owned:
        for kind, buffer in partition.buffers.items():
            values.append(buffer.detach().numpy())
            slices += [(kind, replace(slice_, offset=first + slice_.offset)) for slice_ in partition.slices]
            first += buffer.numel()
    return np.concatenate(values).view(np.uint8), slices


def _flat_shapes(ranks: Ranks) -> dict[str, tuple[int]]:
    sizes: dict[str, int] = {}
    for owned in ranks:
        for partition in owned:
            for slice_ in partition.slices:
                sizes[slice_.parameter] = sizes.get(slice_.parameter, 0) + slice_.length
    return {parameter: (size,) for parameter, size in sizes.items()}
