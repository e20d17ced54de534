"""The memory estimate, the micro-batch that fits, and the dry run that prints both."""

from typing import Any

import pytest

from dit_scale.config import TrainConfig
from dit_scale.data.batch_plan import batch_plan
from dit_scale.errors import ConfigError
from dit_scale.models.zoo import num_parameters, shape_of
from dit_scale.train import dry_run
from dit_scale.train.activations import forward_bytes
from dit_scale.train.memory import (
    AUTOENCODER_BYTES,
    DECODED_PIXELS,
    DECODING_BYTES,
    GIB,
    Memory,
    estimate,
    micro_batch_for,
)
from dit_scale.vae import images_per_pass

PROFILES = [{"name": "a", "decay": 0.9}, {"name": "b", "decay": 0.99}]


def config_of(global_batch: int = 256, **engine: Any) -> TrainConfig:
    tree = {
        "global_batch": global_batch,
        "engine": {"precision": "bf16", "micro_batch": 32, **engine},
        "ema": PROFILES,
    }
    return TrainConfig.model_validate(tree)


def total_gib(config: TrainConfig, micro_batch: int, world: int) -> float:
    plan = batch_plan(config.global_batch, micro_batch, world)
    return estimate(config, shape_of(config.model), plan).on_device / GIB


def test_a_snapshot_holds_what_a_process_owns_on_the_host() -> None:
    config = config_of()
    shape = shape_of(config.model)
    memory = estimate(config, shape, batch_plan(256, 32, 8))
    owned = -(-num_parameters(shape) // 8)
    assert memory.snapshot == 4 * owned * (1 + 2 + len(PROFILES)) == memory.optimizer + memory.ema
    assert memory.on_device == sum(getattr(memory, part) for part in dry_run.PARTS)


def test_without_a_limit_the_micro_batch_is_the_configured_one() -> None:
    config = config_of(micro_batch=10_000)
    assert micro_batch_for(config, shape_of(config.model), 1) == 10_000


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_the_micro_batch_is_the_largest_that_fits(stage: int, world: int) -> None:
    config = config_of(zero_stage=stage, memory_gib=24.0)
    micro_batch = micro_batch_for(config, shape_of(config.model), world)
    assert 0 < micro_batch <= 32
    assert total_gib(config, micro_batch, world) <= 24.0
    assert micro_batch == 32 or total_gib(config, micro_batch + 1, world) > 24.0


def test_a_limit_may_be_met_exactly() -> None:
    exact = total_gib(config_of(), 32, 8)
    config = config_of(memory_gib=exact)
    assert micro_batch_for(config, shape_of(config.model), 8) == 32


@pytest.mark.parametrize(
    ("stage", "remedy"), [(2, "use engine.zero_stage=3, more"), (3, "use more processes")]
)
def test_a_model_that_does_not_fit_is_refused_with_a_remedy(stage: int, remedy: str) -> None:
    config = config_of(zero_stage=stage, memory_gib=1.0)
    needed = total_gib(config, 1, 2)
    with pytest.raises(
        ConfigError, match=rf"about {needed:.2f} GiB per process .* engine.memory_gib is 1: {remedy}"
    ):
        micro_batch_for(config, shape_of(config.model), 2)


def test_a_dry_run_prints_what_depends_on_the_world_size(capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(global_batch=250, memory_gib=6.0)
    dry_run.report(config, 8)
    printed = capsys.readouterr().out
    micro_batch = micro_batch_for(config, shape_of(config.model), 8)
    plan = batch_plan(250, micro_batch, 8)
    assert plan.micro_steps > 1
    memory = estimate(config, shape_of(config.model), plan)
    assert f"250 samples on 8 processes: {plan.micro_steps} micro-steps of {plan.micro_batch} each" in printed
    assert "share of a rank  31 to 32 samples" in printed
    assert "loss scale       0.032\n" in printed
    assert f"about {memory.on_device / GIB:.2f} GiB of 6 GiB per process at ZeRO-2" in printed
    assert f"host snapshot    {memory.snapshot / GIB:8.3f} GiB" in printed


def printed_gib(printed: str, part: str) -> float:
    (line,) = [line for line in printed.splitlines() if line.startswith(f"  {part} ")]
    return float(line.split()[1])


def with_evaluations(config: TrainConfig, **evaluate: Any) -> TrainConfig:
    evaluations = config.evaluate.model_copy(update={"every_steps": 5, **evaluate})
    return config.model_copy(update={"evaluate": evaluations})


def test_a_dry_run_counts_the_second_model_of_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of one sample with recomputed blocks need less than an evaluation of a tile."""
    plain = config_of(global_batch=8, micro_batch=1, activation_checkpointing="block")
    config = with_evaluations(plain, held_out=0.1, grid_images=0, tile=512)
    dry_run.report(plain, 8)
    assert printed_gib(capsys.readouterr().out, "evaluation") == 0
    dry_run.report(config, 8)
    shape = shape_of(config.model)
    forward = forward_bytes(shape, config.engine, 512)
    # Besides model and pass, the latents of the loss.
    wanted = 2 * num_parameters(shape) + forward + 512 * 12 * 4 * 4 * shape.latent_size**2
    assert printed_gib(capsys.readouterr().out, "evaluation") == pytest.approx(wanted / GIB, abs=6e-4)
    # With a small tile, the model's fp32 weights before they are cast to bf16 need most.
    small = with_evaluations(config, tile=8)
    assert needed(small, 1).evaluation == 4 * num_parameters(shape)


def test_an_evaluation_with_images_keeps_the_autoencoder_during_training() -> None:
    plain = config_of(micro_batch=32)
    config = with_evaluations(plain, grid_images=16, tile=8)
    assert needed(config, 32).evaluation == AUTOENCODER_BYTES
    assert needed(config, 32).on_device - needed(plain, 32).on_device == AUTOENCODER_BYTES


@pytest.mark.parametrize("image_size", [256, 512, 1024])
def test_an_evaluation_decodes_as_many_images_at_a_time_as_the_autoencoder(image_size: int) -> None:
    plain = config_of(global_batch=8, micro_batch=1, activation_checkpointing="block")
    model = plain.model.model_copy(update={"image_size": image_size})
    config = with_evaluations(plain.model_copy(update={"model": model}), grid_images=16)
    shape = shape_of(model)
    pixels = images_per_pass(image_size, image_size) * image_size**2
    decoding = DECODING_BYTES * pixels // DECODED_PIXELS
    assert needed(config, 1).evaluation == AUTOENCODER_BYTES + 2 * num_parameters(shape) + decoding


def needed(config: TrainConfig, micro_batch: int) -> Memory:
    return estimate(config, shape_of(config.model), batch_plan(config.global_batch, micro_batch, 8))
