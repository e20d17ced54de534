"""A run folder with checkpoints of a tiny model, made without training."""

from pathlib import Path

import torch
from torch import Tensor

from dit_scale import vae_files
from dit_scale.checkpoint.manifest import CheckpointId
from dit_scale.checkpoint.partition import OPTIMIZER_KINDS, Partition
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import TrainConfig, dump
from dit_scale.models import dit
from dit_scale.storage import open_storage
from dit_scale.train.ema import ema_kind
from tests.support import checkpoints

STEP, ATTEMPT = 40, 1
PROFILES = ("first", "second")


def tiny_config(run: Path, vae: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "run": str(run),
            "model": {"name": "DiT-Ti/2", "image_size": 32, "num_classes": 5},
            "data": {"vae": vae},
            "diffusion": {"timesteps": 100},
            "ema": [{"name": name, "decay": 0.9} for name in PROFILES],
        }
    )


def random_weights(config: TrainConfig, seed: int) -> dict[str, Tensor]:
    """Return every trainable parameter; none is zero, unlike the last layers of a new model."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dit.build(config.model, 0, device="meta", initialise=False).named_parameters()
    return {name: 0.05 * torch.randn(tuple(p.shape), generator=generator) for name, p in parameters}


def write_run(run: Path, vae: str, step: int = STEP) -> dict[str, dict[str, Tensor]]:
    """Write the run, or one more checkpoint of it, as two ranks would; return its EMA profiles."""
    config = tiny_config(run, vae)
    averages = {name: random_weights(config, seed) for seed, name in enumerate(PROFILES)}
    checkpoints.write(
        open_storage(run),
        CheckpointId(step, ATTEMPT),
        [_share(averages, rank) for rank in (0, 1)],
        config=config.model_dump(mode="json"),
        vae_sha256=vae_files.find_vae(vae).identity.weights_sha256,
        model_shapes={name: tuple(tensor.shape) for name, tensor in averages["first"].items()},
    )
    open_storage(run).write("config.yaml", dump(config).encode())
    return averages


def _share(averages: dict[str, dict[str, Tensor]], rank: int) -> list[Partition]:
    """Return the first or the second half of every parameter."""
    partitions = []
    for parameter, whole in averages["first"].items():
        start, end = rank * whole.numel() // 2, (rank + 1) * whole.numel() // 2
        buffers = {kind: torch.zeros(end - start) for kind in OPTIMIZER_KINDS}
        for profile, weights in averages.items():
            buffers[ema_kind(profile)] = weights[parameter].flatten()[start:end].clone()
        partitions.append(Partition(buffers, (ParameterSlice(parameter, start, end - start, 0),)))
    return partitions
