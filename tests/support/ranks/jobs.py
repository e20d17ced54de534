"""What the ranks of the tests run: real training, and one plain torch process as the reference."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from dit_scale.checkpoint import saver
from dit_scale.checkpoint.partition import MASTER
from dit_scale.config import TrainConfig
from dit_scale.data.shards import LatentDataset
from dit_scale.diffusion import schedule as schedules
from dit_scale.models import dit
from dit_scale.train import engine, loop, restore, session, zero
from dit_scale.train.attempt import Attempt
from dit_scale.train.context import RunContext
from dit_scale.train.objective import losses as losses_of
from dit_scale.train.saving import Saves
from dit_scale.train.trainer import Trainer
from tests.support.micro_batches import read_micro_batch
from tests.support.ranks.points import Hold, held

LossRow = dict[str, float]

PEAK_TFLOPS = 0.1
"""Stated, so that starts need not measure it."""


def small_config(run: Path, data: Path, model: str = "DiT-Nano/2", **engine_knobs: object) -> TrainConfig:
    """Configure a tiny model, 7 samples per step: uneven on 2 and 3 ranks, accumulated in micro-batches of 2.

    It uses fp32 unless a test is about bf16, which takes ten times as long on a CPU without bf16
    instructions.
    """
    return TrainConfig.model_validate(
        {
            "run": str(run),
            "steps": 20,
            "global_batch": 7,
            "model": {"name": model, "image_size": 32, "num_classes": 10},
            "data": {"url": str(data)},
            "engine": {"precision": "fp32", "micro_batch": 2, "device": "cpu", **engine_knobs},
            "ema": [{"name": "constant", "decay": 0.9}, {"name": "power", "sigma_rel": 0.1}],
            "checkpoint": {"every_steps": 20},
            "log": {"every_steps": 1, "peak_tflops": PEAK_TFLOPS},
        }
    )


def saving(config: TrainConfig, steps: int, **knobs: object) -> TrainConfig:
    """Return the same run with this number of steps and these checkpoint settings."""
    checkpoint = config.checkpoint.model_copy(update=knobs)
    return config.model_copy(update={"steps": steps, "checkpoint": checkpoint})


def randomise(model: dit.DiT, generator: torch.Generator) -> None:
    """Return random weights without zeros: zero layers would hide errors in the layers before them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def train(config: TrainConfig, random_start: bool = False) -> int:
    """Train as one rank."""
    if not random_start:
        return loop.train(config)
    with patch.object(dit, "initialise_weights", randomise):
        return loop.train(config)


def train_sharded(config: TrainConfig, random_start: bool = False) -> int:
    """Train as one rank that uses ZeRO even if it is alone."""
    with patch.object(engine, "shard", zero.Zero):
        return train(config, random_start)


@contextmanager
def paced() -> Iterator[None]:
    """Make training wait for a save two steps after it starts: saves fall on the same steps everywhere."""
    follow = Saves.follow

    def follow_closely(saves: Saves, *vote: bool) -> None:
        follow(saves, *vote)
        if saves._saver.in_flight and saves._attempt.state.step - saves._saved_step >= 2:
            saves.wait()

    with patch.object(Saves, "follow", follow_closely):
        yield


def train_held(config: TrainConfig, hold: Hold, victim: int) -> int:
    """Train as one rank, paced; rank `victim` or its writer is held at a point."""
    with paced():
        return train_held_unpaced(config, hold, victim)


def train_held_unpaced(config: TrainConfig, hold: Hold, victim: int) -> int:
    """The same at full speed: how many steps happen during a save depends on the machine."""
    if int(os.environ["RANK"]) != victim:
        return loop.train(config)
    with held(hold):
        return loop.train(config)


def train_with_impatient_writer(config: TrainConfig, hold: Hold, victim: int) -> int:
    """The same with writers that give up quickly on a server."""
    with patch.object(saver, "WRITER", (sys.executable, "-m", "tests.support.ranks.impatient_writer")):
        return train_held(config, hold, victim)


def in_environment(environment: dict[str, str], job: Callable[..., Any], *args: Any) -> Any:
    """Run any job with these variables set; the server that ranks are forked from has its own environment."""
    os.environ.update(environment)
    return job(*args)


def train_and_report(config: TrainConfig) -> tuple[dict[str, object], ...]:
    """Train as one rank; return the hyper-parameters of its optimizer groups right after the restore."""
    found: list[tuple[dict[str, object], ...]] = []

    def restore_and_report(context: RunContext, trainer: Trainer, *args: Any, **keywords: Any) -> Any:
        checkpoint = restore.restore(context, trainer, *args, **keywords)
        found.append(trainer.engine.hyper_parameters())
        return checkpoint

    with patch.object(session, "restore", restore_and_report):
        assert loop.train(config) == 0
    return found[0]


def losses(config: TrainConfig) -> list[LossRow]:
    """Return the record of a run."""
    lines = losses_so_far(config)
    keys = ("step", "loss", "mse", "vb", "grad_norm")
    return [{key: json.loads(line)[key] for key in keys} for line in lines]


def losses_so_far(config: TrainConfig) -> list[str]:
    """Return the complete lines of the record."""
    return (Path(config.run) / "metrics.jsonl").read_text().splitlines(keepends=True)


def plain_model(config: TrainConfig) -> dit.DiT:
    with patch.object(dit, "initialise_weights", randomise):
        return dit.build(config.model, config.seed)


def plain_sums(config: TrainConfig, model: dit.DiT, dataset: LatentDataset, step: int) -> torch.Tensor:
    """Return (loss, mse, bound) of a global batch in one forward pass, mean over its samples."""
    count = config.global_batch
    positions = torch.arange(step * count, (step + 1) * count).numpy()
    batch = read_micro_batch(dataset, positions, count, config.seed, config.data.horizontal_flip)
    schedule = schedules.linear(config.diffusion.timesteps)
    by_sample = losses_of(
        model,
        schedule,
        batch,
        seed=config.seed,
        latent_scale=dataset.info.vae.scale,
        null_class=config.model.num_classes,
        label_dropout=config.diffusion.label_dropout,
    )
    return by_sample.sums(batch.weight_B) / count


def plain_training(config: TrainConfig) -> tuple[list[LossRow], dict[str, torch.Tensor]]:
    """The reference: one process, plain torch in fp32, no DeepSpeed, no accumulation."""
    torch.set_num_threads(1)
    model = plain_model(config)
    dataset = LatentDataset.open(config.data.url)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, weight_decay=0.0)
    rows = []
    for step in range(config.steps):
        sums = plain_sums(config, model, dataset, step)
        optimizer.zero_grad()
        sums[0].backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        loss, mse, vb = sums.tolist()
        rows.append({"step": step + 1, "loss": loss, "mse": mse, "vb": vb, "grad_norm": norm.item()})
    return rows, {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradient_of_first_step(config: TrainConfig) -> dict[tuple[str, int], np.ndarray]:
    """Return this rank's part of the full gradient by (parameter, start), from SGD's first momentum."""

    def sgd(parameters: list[torch.Tensor], *_: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)

    found: dict[tuple[str, int], np.ndarray] = {}

    def keep(attempt: Attempt) -> None:
        zero_engine = attempt._trainer.engine
        for partition in zero_engine.owned:
            master = partition.buffers[MASTER]
            momentum = zero_engine._optimizer.state[master]["momentum_buffer"]
            for slice_ in partition.slices:
                piece = momentum[slice_.offset : slice_.offset + slice_.length]
                found[slice_.parameter, slice_.start] = piece.numpy().copy()

    with (
        patch.object(dit, "initialise_weights", randomise),
        patch.object(zero, "build_optimizer", sgd),
        patch.object(Attempt, "log", keep),
        patch.object(Saves, "save_and_wait", lambda saves: None),  # SGD has other hyper-parameters
    ):
        loop.train(config)
    return found


def plain_gradient(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Return the gradient of the first global batch in one plain torch process, flattened."""
    model = plain_model(config)
    plain_sums(config, model, LatentDataset.open(config.data.url), 0)[0].backward()
    return {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
