"""Checkpoints written by the product's own functions, without a run and without a writer process."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dit_scale.checkpoint import rankfile
from dit_scale.checkpoint.manifest import CHECKPOINTS, CheckpointId, Manifest
from dit_scale.checkpoint.partition import Partition
from dit_scale.checkpoint.rankfile import Bytes, Piece
from dit_scale.checkpoint.writer import put_manifest
from dit_scale.config import TrainConfig
from dit_scale.storage import Storage

Ranks = Sequence[Iterable[Partition]]
"""What each rank owns."""


def write(
    root: Storage, checkpoint_id: CheckpointId, ranks: Ranks, folder: str = CHECKPOINTS, **fields: Any
) -> Manifest:
    """Write the rank files and the manifest of a checkpoint below a folder of the root.

    `fields` go into the manifest. Without them, parameters have the shapes of flat parameters.
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
    put_manifest(root, manifest, folder)
    return manifest


def write_rank(
    root: Storage,
    checkpoint_id: CheckpointId,
    rank: int,
    owned: Iterable[Partition],
    folder: str = CHECKPOINTS,
) -> rankfile.FileRecord:
    """Write the file of one rank, with all kinds that its partitions hold."""
    return rankfile.write(root, f"{checkpoint_id.path(folder)}/{rankfile.name_of_rank(rank)}", pieces(owned))


def pieces(owned: Iterable[Partition]) -> list[tuple[Piece, Bytes]]:
    """Return the tensors of a rank's file."""
    return [
        (
            Piece(kind, extent.parameter, extent.start, extent.length),
            buffer.detach().numpy()[extent.offset : extent.offset + extent.length].view(np.uint8),
        )
        for partition in owned
        for kind, buffer in partition.buffers.items()
        for extent in partition.extents
    ]


def _flat_shapes(ranks: Ranks) -> dict[str, tuple[int]]:
    sizes: dict[str, int] = {}
    for owned in ranks:
        for partition in owned:
            for extent in partition.extents:
                sizes[extent.parameter] = sizes.get(extent.parameter, 0) + extent.length
    return {parameter: (size,) for parameter, size in sizes.items()}
