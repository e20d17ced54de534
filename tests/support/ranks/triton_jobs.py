"""Training with Triton's AdamW on a CPU: its kernel runs in the interpreter."""

import os
from typing import NamedTuple
from unittest.mock import patch

import torch

from dit_scale.config import TrainConfig
from dit_scale.train import one_process, zero
from dit_scale.train.ema import Ema
from tests.support.ranks import guard_jobs


class Trained(NamedTuple):
    """What a rank reports."""

    optimizer: str
    """The name of its class."""
    left: list[int]
    """Averages that the optimizer left to `Ema.update`, by step."""
    outcome: guard_jobs.Outcome


def pass_over_failures(config: TrainConfig) -> Trained:
    """Run `guard_jobs.pass_over_failures` in a new process."""
    os.environ["TRITON_INTERPRET"] = "1"
    built: list[str] = []
    left: list[int] = []
    build, update = zero.build_optimizer, Ema.update

    def build_for_cuda(*args: object) -> torch.optim.Optimizer:
        optimizer = build(*args[:-1], torch.device("cuda"))  # type: ignore[arg-type]
        built.append(type(optimizer).__name__)
        return optimizer

    def count_and_update(ema: Ema, step: int) -> None:
        left.append(len(ema._followers or ()))
        update(ema, step)

    with (
        patch.object(one_process, "build_optimizer", build_for_cuda),
        patch.object(zero, "build_optimizer", build_for_cuda),
        patch.object(Ema, "update", count_and_update),
    ):
        outcome = guard_jobs.pass_over_failures(config, rounding=1e-6)
    return Trained(*built, left, outcome)
