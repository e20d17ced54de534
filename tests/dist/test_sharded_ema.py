"""Sharded EMA, where each rank averages what it owns, equals one replica bit for bit."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import EmaProfile, TrainConfig
from dit_scale.train import loop
from dit_scale.train.ema import Ema, ema_kind
from dit_scale.train.run_folder import root_of
from dit_scale.train.trainer import Trainer
from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.processes import run

pytestmark = pytest.mark.dist

WORLD = 3
PROFILES = (EmaProfile(name="constant", decay=0.9), EmaProfile(name="power", sigma_rel=0.1))

Weights = list[tuple[str, int, np.ndarray]]
"""What a rank owns: (parameter, first element, fp32 values)."""


def train_and_keep_masters(config: TrainConfig) -> list[Weights]:
    """Train as one rank; return its masters at the start and after every step."""
    kept: list[Weights] = []

    def keep(trainer: Trainer) -> None:
        kept.append(
            [
                (e.parameter, e.start, part.buffers[MASTER].detach().numpy()[e.offset :][: e.length].copy())
                for part in trainer.engine.owned
                for e in part.slices
            ]
        )

    update, start = Trainer.update, Trainer.start

    def start_and_keep(trainer: Trainer) -> None:
        start(trainer)
        keep(trainer)

    def update_and_keep(trainer: Trainer, sums: Tensor, step: int) -> Tensor:
        row = update(trainer, sums, step)
        keep(trainer)
        return row

    with (
        patch.object(Trainer, "update", update_and_keep),
        patch.object(Trainer, "start", start_and_keep),
    ):
        assert loop.train(config) == 0
    return kept


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_sharded_averages_equal_replicated_ones(tmp_path: Path, stage: int, precision: str) -> None:
    write_latents(tmp_path / "data", num=40)
    config = jobs.small_config(tmp_path / "run", tmp_path / "data", zero_stage=stage, precision=precision)
    config = jobs.saving(config, steps=6, every_steps=6).model_copy(update={"ema": PROFILES})
    ranks = run(WORLD, train_and_keep_masters, config)
    root = root_of(config)
    checkpoint = Checkpoint(root, committed(root)[0])
    sizes = {name: torch.Size(shape).numel() for name, shape in checkpoint.manifest.model_shapes.items()}
    offsets = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
    replica = Partition(
        {MASTER: torch.full((sum(sizes.values()),), torch.nan)},
        tuple(ParameterSlice(name, 0, size, offsets[name]) for name, size in sizes.items()),
    )
    ema = Ema(PROFILES, (replica,))
    for step, parts in enumerate(zip(*ranks, strict=True)):
        for name, start, values in (piece for part in parts for piece in part):
            replica.buffers[MASTER][offsets[name] + start :][: len(values)] = torch.from_numpy(values)
        assert not replica.buffers[MASTER].isnan().any()
        if step == 0:
            ema.start()
        else:
            ema.update(step)
    for profile in PROFILES:
        kind = ema_kind(profile.name)
        for name, tensor in checkpoint.read_whole(kind).items():
            assert torch.equal(tensor.flatten(), replica.buffers[kind][offsets[name] :][: sizes[name]])
