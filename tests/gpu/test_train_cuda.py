"""Training on CUDA: it learns, gives the same bits each time, and never waits between log points.

Every run has fresh processes, because DeepSpeed can start once per process only. The large models need 24 GB
of GPU memory; two of the tests need two devices.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dit_scale import rng
from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import FileRecord
from dit_scale.checkpoint.partition import MASTER
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import GuardConfig, TrainConfig
from dit_scale.errors import DeviceError
from dit_scale.models import attention, dit
from dit_scale.models.zoo import num_parameters, shape_of
from dit_scale.rng import Purpose
from dit_scale.telemetry.meters import SKIPPED
from dit_scale.telemetry.pace import TIMED_KEYS
from dit_scale.train import loop
from dit_scale.train.attempt import Attempt
from dit_scale.train.ema import Ema, ema_kind
from dit_scale.train.engine import Engine
from dit_scale.train.guard import Guard
from dit_scale.train.run_folder import root_of
from dit_scale.train.saving import Saves
from tests.support.latents import write_latents
from tests.support.ranks import guard_jobs, jobs, processes

DEVICE = "cuda"
LARGE, SMALL = "DiT-XL/2", "DiT-S/2"
LARGE_BYTES = 24e9
STEPS, SAVE_EVERY, KILLED_AT = 9, 4, 6
DECAY = 0.9
ROUNDING = 1e-3
"""Relative difference of fp32 losses between devices; the patch convolution may run in TF32."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: torch sees no device"),
]
two_devices = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two CUDA devices: torch sees {torch.cuda.device_count()}"
)


@pytest.fixture(autouse=True, scope="module")
def _fresh_processes() -> Iterator[None]:
    """Spawn ranks: the server that other tests fork from uses the CPU and sets the environment for it."""
    spawn = multiprocessing.get_context("spawn")
    with patch.object(processes, "_context", spawn), patch.dict(os.environ):
        os.environ.pop("DS_ACCELERATOR", None)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Random latents of 1000 classes, by image size."""
    folders = {size: tmp_path_factory.mktemp(f"latents{size}") for size in (256, 512)}
    for size, folder in folders.items():
        write_latents(folder, num=64, image_size=size, num_classes=1000)
    return folders


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run folder, removed after the test because checkpoints are large."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def config_of(run: Path, data: Path, model: str = SMALL, size: int = 256, **engine: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "run": str(run),
            "steps": STEPS,
            "global_batch": 16,
            "model": {"name": model, "image_size": size},
            "data": {"url": str(data)},
            "engine": {"device": DEVICE, "micro_batch": 8, **engine},
            "ema": [{"name": "constant", "decay": DECAY}],
            "checkpoint": {"every_steps": SAVE_EVERY},
            "log": {"every_steps": 1},
        }
    )


# Learning


@pytest.mark.parametrize(("size", "micro_batch"), [(256, 8), (512, 4)])
def test_the_large_model_learns(folder: Path, data: dict[int, Path], size: int, micro_batch: int) -> None:
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < LARGE_BYTES:
        pytest.skip(f"needs {LARGE_BYTES / 1e9:.0f} GB of GPU memory: this one has {memory / 1e9:.0f}")
    config = config_of(folder, data[size], LARGE, size, micro_batch=micro_batch)
    config = config.model_copy(update={"steps": 30})
    assert processes.run(1, train_without_saving, config) == [0]
    rows = jobs.losses(config)
    losses = [row["loss"] for row in rows]
    print(f"{LARGE} at {size} px: loss {losses[0]:.4f} at step 1, {losses[-1]:.4f} after {len(losses)} steps")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    # The initial output is 0, so the squared error of the noise is 1; the bound is about 0.016.
    assert 0.95 < losses[0] < 1.1
    assert sum(losses[-5:]) / 5 < 0.95 * losses[0]


def train_without_saving(config: TrainConfig) -> int:
    """Train without saves: the state of the large model is 11 GB, and the small one tests saving."""
    with patch.object(Saves, "save"), patch.object(Saves, "save_and_wait"):
        return loop.train(config)


# The same bits


Job = Callable[[TrainConfig], int]


@pytest.fixture(
    scope="module",
    params=[
        (jobs.train, 2, False),
        (jobs.train, 2, True),
        (jobs.train_sharded, 1, False),
        (jobs.train_sharded, 2, False),
        (jobs.train_sharded, 3, False),
    ],
    ids=["alone", "compiled", "stage1", "stage2", "stage3"],
)
def straight(
    request: pytest.FixtureRequest, data: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Job, TrainConfig]]:
    """A run without interruption, and the job that trained it."""
    job, stage, compiled = request.param
    run = tmp_path_factory.mktemp("straight")
    config = config_of(run, data[256], zero_stage=stage, compile_blocks=compiled)
    assert processes.run(1, job, config) == [0]
    yield job, config
    shutil.rmtree(run)


def test_started_twice_gives_the_same_bits(straight: tuple[Job, TrainConfig], folder: Path) -> None:
    job, config = straight
    again = config.model_copy(update={"run": str(folder)})
    assert processes.run(1, job, again) == [0]
    assert jobs.losses(again) == jobs.losses(config)
    assert final_files(again) == final_files(config)


def test_killed_and_resumed_gives_the_same_bits(straight: tuple[Job, TrainConfig], folder: Path) -> None:
    job, whole = straight
    config = whole.model_copy(update={"run": str(folder)})
    assert processes.run(1, job, config.model_copy(update={"steps": SAVE_EVERY})) == [0]
    ranks, _ = processes.start(1, train_until_killed, job, config)
    for process in ranks:
        process.join(processes.TIMEOUT_S)
        assert process.exitcode == -signal.SIGKILL
    assert newest(config).manifest.step == SAVE_EVERY
    assert processes.run(1, job, config) == [0]
    assert jobs.losses(config) == jobs.losses(whole)
    assert final_files(config) == final_files(whole)


def train_until_killed(job: Job, config: TrainConfig) -> None:
    original = Ema.update

    def update(ema: Ema, step: int) -> None:
        original(ema, step)
        if step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(Ema, "update", update):
        job(config)


def newest(config: TrainConfig) -> Checkpoint:
    root = root_of(config)
    return Checkpoint(root, committed(root)[0])


def final_files(config: TrainConfig) -> tuple[FileRecord, ...]:
    """The files of the last checkpoint, with the checksums of masters, moments and averages."""
    checkpoint = newest(config)
    assert checkpoint.manifest.step == config.steps
    return checkpoint.manifest.files


# State


def test_saved_averages_follow_the_formula(folder: Path, data: dict[int, Path]) -> None:
    config = config_of(folder, data[256])
    average = {
        name: weight.double() for name, weight in dit.build(config.model, config.seed).named_parameters()
    }
    for steps in (1, 2, 3):
        assert processes.run(1, jobs.train, config.model_copy(update={"steps": steps})) == [0]
        checkpoint = newest(config)
        assert checkpoint.manifest.step == steps
        masters, saved = checkpoint.read_whole(MASTER), checkpoint.read_whole(ema_kind("constant"))
        for weight in average:
            average[weight] = DECAY * average[weight] + (1 - DECAY) * masters[weight].double()
            torch.testing.assert_close(saved[weight].double(), average[weight], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_a_gpu_resumes_on_a_cpu(folder: Path, data: dict[int, Path]) -> None:
    straight = config_of(folder / "straight", data[256], "DiT-Ti/8", precision="fp32")
    moved = straight.model_copy(update={"run": str(folder / "moved")})
    assert processes.run(1, jobs.train, straight) == [0]
    assert processes.run(1, jobs.train, moved.model_copy(update={"steps": SAVE_EVERY})) == [0]
    engine = moved.engine.model_copy(update={"device": "cpu"})
    assert processes.run(1, jobs.train, moved.model_copy(update={"engine": engine})) == [0]
    assert largest_difference(moved, straight) < ROUNDING


def test_draws_equal_those_of_the_cpu() -> None:
    position_N = torch.arange(10**6, 10**6 + 64)
    words = partial(rng.words, 7, Purpose.TIMESTEP, num_words=9)
    assert torch.equal(words(position_N.to(DEVICE)).cpu(), words(position_N))
    for draw in (
        partial(rng.integers, 7, Purpose.TIMESTEP, high=1000),
        partial(rng.uniforms, 7, Purpose.VIEW),
    ):
        assert torch.equal(draw(position_N=position_N.to(DEVICE)).cpu(), draw(position_N=position_N))
    normals = partial(rng.normals, 7, Purpose.NOISE, shape=(4, 32, 32))
    here, there = normals(position_N), normals(position_N.to(DEVICE)).cpu()
    ulps = (here.view(torch.int32) - there.view(torch.int32)).abs().max().item()
    print(f"normals differ by at most {ulps} ulp")
    assert ulps <= 1


# The guard


def test_failed_steps_have_no_effect(folder: Path, data: dict[int, Path]) -> None:
    config = config_of(folder, data[256])
    config = config.model_copy(update={"guard": GuardConfig(spike_factor=20.0, horizon_steps=1)})
    (outcome,) = processes.run(1, guard_jobs.pass_over_failures, config)
    assert [row[SKIPPED] for row in outcome.rows] == [0, 1, 1, 1, 0]


# Attention


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns about the reason when it lacks a kernel
@pytest.mark.parametrize("tokens", [256, 1024])
@pytest.mark.parametrize("name", [name for name in attention.BACKENDS if name != "sdpa_math"])
def test_attention_agrees_with_the_plain_kernel(name: str, tokens: int) -> None:
    """Compare output and gradients in bf16 with sdpa_math in fp32: within 2^-7 of the norm."""
    exact = attend("sdpa_math", tokens, torch.float32)
    try:
        got = attend(name, tokens, torch.bfloat16)
    except DeviceError as error:
        pytest.skip(str(error))
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        pytest.skip(f"{name}: torch has no such kernel for {torch.cuda.get_device_name()}")
    for what, expected in exact.items():
        off = ((got[what].float() - expected).norm() / expected.norm()).item()
        print(f"{name}, {tokens} tokens, {what}: off by {off:.2e} of its norm")
        assert off < 2**-7


def attend(name: str, tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return output and gradients of one backend, for two images and the heads of DiT-XL/2."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (2, 16, tokens, 72)
    numbers = [torch.randn(shape, generator=generator).bfloat16() for _ in range(4)]
    q, k, v, weight = (number.to(DEVICE, dtype).requires_grad_() for number in numbers)
    out = attention.choose(name)(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), weight)
    return dict(zip(("output", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


# Waiting


def test_the_host_does_not_wait_between_log_points(folder: Path, data: dict[int, Path]) -> None:
    config = config_of(folder, data[256])
    log = config.log.model_copy(update={"every_steps": 3})
    config = config.model_copy(update={"steps": 6, "log": log})
    assert processes.run(1, train_without_waiting, config) == [0]


@two_devices
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_host_waits_for_two_devices_only_in_deepspeed(
    folder: Path, data: dict[int, Path], stage: int
) -> None:
    config = config_of(folder, data[256], zero_stage=stage)
    log = config.log.model_copy(update={"every_steps": 3})
    config = config.model_copy(update={"steps": 6, "log": log})
    assert processes.run(2, train_waiting_in_deepspeed, config) == [0, 0]


def train_waiting_in_deepspeed(config: TrainConfig) -> int:
    """Let DeepSpeed wait in its backward pass and its step (tests/dist/test_host_syncs.py lists where).

    The guard, which it calls there, may not.
    """
    with (
        patch.object(Engine, "backward", in_mode("default", Engine.backward)),
        patch.object(Engine, "step", in_mode("default", Engine.step)),
        patch.object(Guard, "judge", in_mode("error", Guard.judge)),
    ):
        return train_without_waiting(config)


def train_without_waiting(config: TrainConfig) -> int:
    """Make waiting an error, from the first log point to the second.

    torch's debug mode reports what reads from the device, but not an explicit wait.
    """
    first = config.log.every_steps
    log, keeps_failing = Attempt.log, Attempt.keeps_failing
    synchronize = torch.cuda.synchronize

    def wait(*args: Any) -> None:
        if torch.cuda.get_sync_debug_mode():
            raise RuntimeError("torch.cuda.synchronize() between log points")
        synchronize(*args)

    def start_log_point(attempt: Attempt) -> bool:
        torch.cuda.set_sync_debug_mode("default")
        return keeps_failing(attempt)

    def finish_log_point(attempt: Attempt) -> None:
        log(attempt)
        if attempt.state.step == first:
            torch.cuda.set_sync_debug_mode("error")
            with pytest.raises(RuntimeError, match="between log points"):
                torch.cuda.synchronize()
            with pytest.raises(RuntimeError, match="synchronizing"):
                torch.ones((), device=DEVICE).item()

    with (
        patch.object(Attempt, "keeps_failing", start_log_point),
        patch.object(Attempt, "log", finish_log_point),
        patch.object(torch.cuda, "synchronize", wait),
    ):
        return loop.train(config)


def in_mode(mode: str, method: Any) -> Any:
    """Wrap a method to run in this sync debug mode."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            return method(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return call


# Measurements


def test_log_points_measure_the_device(folder: Path, data: dict[int, Path]) -> None:
    """Events time the steps; allocated memory holds masters, both moments, an average and bf16 weights."""
    config = config_of(folder, data[256])
    assert processes.run(1, jobs.train, config) == [0]
    state_gib = (4 * 4 + 2) * num_parameters(shape_of(config.model)) / 2**30
    for line in jobs.losses_so_far(config):
        row = json.loads(line)
        print({key: row[key] for key in TIMED_KEYS})
        assert 0 < row["mfu"] < 1
        assert 0 < row["step_s_p50"] <= row["step_s_p99"]
        assert state_gib < row["memory_gib"] < row["memory_peak_gib"]


# Two devices


@two_devices
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_devices_train_as_one(folder: Path, data: dict[int, Path], stage: int) -> None:
    one = config_of(folder / "one", data[256], zero_stage=stage, precision="fp32")
    two = one.model_copy(update={"run": str(folder / "two")})
    assert processes.run(1, jobs.train, one) == [0]
    assert processes.run(2, jobs.train, two) == [0, 0]
    assert largest_difference(two, one) < ROUNDING


@two_devices
def test_two_devices_give_the_same_bits_each_time(folder: Path, data: dict[int, Path]) -> None:
    configs = [config_of(folder / name, data[256]) for name in ("first", "second")]
    for config in configs:
        assert processes.run(2, jobs.train, config) == [0, 0]
    assert jobs.losses(configs[0]) == jobs.losses(configs[1])
    assert final_files(configs[0]) == final_files(configs[1])


def largest_difference(got: TrainConfig, expected: TrainConfig) -> float:
    """Return the largest relative difference of the losses."""
    rows = zip(jobs.losses(got), jobs.losses(expected), strict=True)
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in rows)
    print(f"largest relative difference of the loss {worst:.1e}")
    return worst
