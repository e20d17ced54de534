"""The model's inputs in a real run: every draw is a function of seed and position, whatever the rank."""

import math
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from dit_scale.config import TrainConfig
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.data.order import sample_ids
from dit_scale.data.shards import LatentDataset
from dit_scale.train import loop
from dit_scale.train.engine import Engine
from dit_scale.train.objective import MicroBatchObserver, SampleLosses
from dit_scale.train.trainer import Trainer
from tests.support import philox
from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.processes import run

pytestmark = pytest.mark.dist

WORLD, STEPS, SEED, NUM, NUM_CLASSES = 2, 3, 5, 40, 10
LABEL_DROPOUT, SCALE, TIMESTEPS = 0.4, 0.5, 1000

Given = tuple[int, int, int, np.ndarray]
"""Position, timestep, label and noised latent of a sample, as the model received them."""


def train_and_report(config: TrainConfig) -> list[Given]:
    """Train as one rank; return what the model received, without fillers."""
    given: list[Given] = []
    last: tuple[torch.Tensor, ...] = ()
    accumulate, call = Trainer.accumulate, Engine.__call__

    def call_and_keep(self: Engine, *inputs: torch.Tensor) -> torch.Tensor:
        nonlocal last
        last = inputs
        return call(self, *inputs)

    def accumulate_and_tell(
        self: Trainer, batches: Iterator[MicroBatch], observer: MicroBatchObserver
    ) -> torch.Tensor:
        def tell(batch: MicroBatch, by_sample: SampleLosses) -> None:
            observer(batch, by_sample)
            x_BCHW, t_B, y_B = last
            for i in batch.weight_B.nonzero().flatten():
                given.append((int(batch.position_B[i]), int(t_B[i]), int(y_B[i]), x_BCHW[i].numpy()))

        return accumulate(self, batches, tell)

    with (
        patch.object(Engine, "__call__", call_and_keep),
        patch.object(Trainer, "accumulate", accumulate_and_tell),
    ):
        assert loop.train(config) == 0
    return given


def test_inputs_of_the_model(tmp_path: Path) -> None:
    data = tmp_path / "latents"
    write_latents(data, num=NUM, num_classes=NUM_CLASSES)
    dataset = LatentDataset.open(data)
    config = jobs.saving(jobs.small_config(tmp_path / "run", data), steps=STEPS)
    diffusion = config.diffusion.model_copy(update={"label_dropout": LABEL_DROPOUT})
    config = config.model_copy(update={"seed": SEED, "diffusion": diffusion})
    ranks = run(WORLD, train_and_report, config)
    samples = sorted((sample for rank in ranks for sample in rank), key=lambda sample: sample[0])
    assert [sample[0] for sample in samples] == list(range(STEPS * config.global_batch))

    dropped = 0
    for position, t, y, x in samples:
        moments, label = dataset.read(int(sample_ids(np.array([position]), NUM, SEED)[0]))
        view = philox.words(SEED, philox.VIEW, position, 1)[0] * 2 >> 32
        mean, std = moments[view].astype(np.float64).reshape(2, 4, 4, 4)
        noise, posterior = (
            np.reshape(philox.normals(SEED, purpose, position, 64), (4, 4, 4))
            for purpose in (philox.NOISE, philox.POSTERIOR)
        )
        assert t == philox.words(SEED, philox.TIMESTEP, position, 1)[0] * TIMESTEPS >> 32
        is_dropped = philox.uniform(SEED, philox.LABEL_DROP, position) < LABEL_DROPOUT
        assert y == (NUM_CLASSES if is_dropped else label)
        dropped += is_dropped
        signal = math.prod(1 - (1e-4 + (2e-2 - 1e-4) * step / (TIMESTEPS - 1)) for step in range(t + 1))
        z = SCALE * (mean + std * posterior)
        expected = math.sqrt(signal) * z + math.sqrt(1 - signal) * noise
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)
    assert 0 < dropped < len(samples)
