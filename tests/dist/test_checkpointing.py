"""Activation checkpointing changes no bit of a run, at any ZeRO stage."""

import hashlib
from pathlib import Path
from unittest.mock import patch

import pytest

from dit_scale.config import TrainConfig
from dit_scale.train.attempt import Attempt
from dit_scale.train.saving import Saves
from tests.support.ranks import jobs
from tests.support.ranks.processes import run

pytestmark = pytest.mark.dist


def train_two_steps(config: TrainConfig) -> tuple[str, int]:
    """Return the digest of all state that this rank owns, and how many parameters are not gathered."""
    digest = hashlib.sha256()
    absent = 0

    def keep(attempt: Attempt) -> None:
        nonlocal absent
        engine = attempt._trainer.engine
        for partition in engine.owned:
            for _, buffer in sorted(partition.buffers.items()):
                digest.update(buffer.detach().numpy().tobytes())
        absent = sum(parameter.numel() == 0 for parameter in engine.module.parameters())

    with patch.object(Attempt, "log", keep), patch.object(Saves, "save_and_wait", lambda saves: None):
        assert jobs.train(config, random_start=True) == 0
    return digest.hexdigest(), absent


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_has_the_same_bits_with_recomputed_activations(data: Path, tmp_path: Path, stage: int) -> None:
    # At stage 3, DeepSpeed shards only parameters above 100,000 elements: DiT-S has some.
    model = "DiT-S/4" if stage == 3 else "DiT-Nano/2"
    results = {}
    for mode in ("none", "block") if stage == 3 else ("none", "block", "selective"):
        config = jobs.small_config(
            tmp_path / mode, data, model, zero_stage=stage, activation_checkpointing=mode
        )
        results[mode] = run(2, train_two_steps, config.model_copy(update={"steps": 2}))
    plain = results.pop("none")
    assert all((absent > 0) == (stage == 3) for _, absent in plain)
    for mode, result in results.items():
        assert result == plain, mode
