"""Between two log points our code never waits for the device, and DeepSpeed only in known places.

On a CPU every tensor can be read immediately, so a wait does not show. The tests make waits visible in two
ways: our part of a step runs on the meta device, where reading a number is an error; and a complete training
run is recorded, with every read attributed to the function that made it.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import EmaProfile, GuardConfig, ModelConfig, TrainConfig
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.diffusion import schedule as schedules
from dit_scale.models import dit
from dit_scale.telemetry.meters import COLUMNS, SAMPLE_COLUMNS, Meters
from dit_scale.train import loop, zero
from dit_scale.train.attempt import Attempt
from dit_scale.train.ema import Ema
from dit_scale.train.guard import Guard
from dit_scale.train.objective import losses
from tests.support.latents import write_latents
from tests.support.ranks.processes import run

META = torch.device("meta")
PROFILES = (EmaProfile(name="constant", decay=0.9), EmaProfile(name="power", sigma_rel=0.1))
LOG_EVERY = 3

EMA_PASS = "aten._foreach_lerp_.Scalar"
Place = tuple[str, str]
"""(module, function)"""

OUR_VOTE = {("dit_scale.dist", "result"): LOG_EVERY}
"""The vote on stopping is a host tensor on any device: read once per step, and no kernel waits for it."""

MICRO_STEPS = 2

# What DeepSpeed 0.19.8 reads in a step: (stage, precision, clipping) => functions of its runtime.utils.
# Stage 1 with bf16 weights uses its BF16_Optimizer. With fp32 its check cannot be switched off.
DEEPSPEED_READS = {
    (1, "bf16", False): ["is_invalid_grad_norm"],
    (1, "bf16", True): ["is_invalid_grad_norm", "clip_tensors_by_global_norm"],
    (1, "fp32", False): ["is_invalid_grad_norm"],
    (2, "bf16", False): [],
    (2, "bf16", True): ["is_invalid_grad_norm"],
    (2, "fp32", False): ["is_invalid_grad_norm"],
    (3, "bf16", False): ["is_invalid_grad_norm"],
    (3, "bf16", True): ["is_invalid_grad_norm"],
}

# Where DeepSpeed waits for a device or a stream, with how often per step, on the path that it takes on CUDA.
EPILOGUE = ("deepspeed.runtime.zero.stage_1_and_2", "independent_gradient_partition_epilogue")
DEEPSPEED_WAITS: dict[tuple[int, str], dict[Place, int]] = {
    (1, "bf16"): {},
    (1, "fp32"): {EPILOGUE: 1},
    (2, "bf16"): {EPILOGUE: MICRO_STEPS},
    (2, "fp32"): {EPILOGUE: MICRO_STEPS},
    (3, "bf16"): {
        ("deepspeed.runtime.zero.stage3", "__reduce_and_partition_ipg_grads"): MICRO_STEPS,
        ("deepspeed.runtime.zero.stage3", "independent_gradient_partition_epilogue"): MICRO_STEPS,
        ("deepspeed.runtime.zero.partition_parameters", "_allgather_params_coalesced"): 1,
    },
}


class Watch:
    """Host reads of one training run between its first and its second log point, by place."""

    def __init__(self) -> None:
        self.on = False
        self.reads: Counter[Place] = Counter()
        self.uploads: Counter[Place] = Counter()
        self.waits: Counter[Place] = Counter()
        self.autocast: Counter[Place] = Counter()
        self.operators: Counter[str] = Counter()

    def keeps_failing(self, original: Any, attempt: Attempt) -> bool:
        """Replace `Attempt.keeps_failing`, which starts a log point: reads are allowed from here."""
        self.on = False
        failing: bool = original(attempt)
        return failing

    def log(self, original: Any, attempt: Attempt) -> None:
        """Replace `Attempt.log`, which finishes a log point."""
        original(attempt)
        self.on = attempt.state.step == LOG_EVERY


class Operators(TorchDispatchMode):
    """Record what reaches the kernels: the scalar read below every bool(), int(), float() and item()."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.watch.on:
            self.watch.operators[str(func)] += 1
            if func is torch.ops.aten._local_scalar_dense.default:
                self.watch.reads[place()] += 1
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Record calls that never reach a kernel on a CPU, and numbers that become tensors."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.watch.on:
            if torch.is_autocast_enabled("cpu"):  # below this mode, the dispatcher would read it as disabled
                self.watch.autocast[place()] += 1
            name = getattr(func, "__name__", "")
            if name in ("tolist", "numpy", "cpu", "__array__"):
                self.watch.reads[place()] += 1
            from_number = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
            if from_number and "device" in (kwargs or {}):
                self.watch.uploads[place()] += 1
        return func(*args, **(kwargs or {}))


def place() -> Place:
    """Return the innermost function of dit_scale or DeepSpeed on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in ("dit_scale", "deepspeed"):
            return module, frame.f_code.co_name
        frame = frame.f_back
    return "?", "?"


class Stream:
    """A stream or an event of a device, as DeepSpeed uses them; a wait of the host is recorded."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def synchronize(self) -> None:
        if self.watch.on:
            self.watch.waits[place()] += 1

    def wait_stream(self, *_: "Stream") -> None:
        """Make the work enqueued later wait for another stream; the host does not wait."""

    def query(self) -> bool:
        """Whether the device has passed this event: never, as far as the host can rely on."""
        return False

    record = wait_event = wait_stream


@contextmanager
def path_of_cuda(watch: Watch) -> Iterator[None]:
    """Let DeepSpeed handle streams as it does on CUDA, with overlapped communication."""
    import deepspeed.accelerator

    accelerator = type(deepspeed.accelerator.get_accelerator())
    original = zero.deepspeed_config

    def overlapping(*args: Any) -> dict[str, Any]:
        tree = original(*args)
        tree["zero_optimization"]["overlap_comm"] = True
        return tree

    def new_stream(*_: object, **__: object) -> Stream:
        return Stream(watch)

    with (
        patch.object(zero, "deepspeed_config", overlapping),
        patch.object(accelerator, "resolves_data_dependency", lambda _: False),
        patch.object(accelerator, "is_synchronized_device", lambda _: False),
        patch.object(accelerator, "synchronize", lambda *_: Stream(watch).synchronize()),
        patch.object(accelerator, "Stream", new_stream),
        patch.object(accelerator, "current_stream", new_stream),
        patch.object(accelerator, "default_stream", new_stream),
        patch.object(accelerator, "Event", new_stream),
        patch.object(accelerator, "stream", lambda *_: nullcontext()),
        patch.object(torch.Tensor, "record_stream", lambda *_: None),
    ):
        yield


def watch_training(config: TrainConfig) -> Watch:
    """Train in this process and return the reads."""
    watch = Watch()
    log, keeps_failing = Attempt.log, Attempt.keeps_failing
    with (
        patch.object(Attempt, "log", lambda attempt: watch.log(log, attempt)),
        patch.object(Attempt, "keeps_failing", lambda attempt: watch.keeps_failing(keeps_failing, attempt)),
        path_of_cuda(watch),
        Operators(watch),
        Calls(watch),
    ):
        loop.train(config)
    return watch


def config_of(folder: Path, world: int, stage: int, precision: str, clipping: bool) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "run": str(folder / "run"),
            "steps": 2 * LOG_EVERY,
            "global_batch": 2 * MICRO_STEPS * world,
            "model": {"name": "DiT-Ti/2", "image_size": 32, "num_classes": 10},
            "data": {"url": str(folder / "latents")},
            "optimizer": {"clip_grad_norm": float(clipping)},
            "engine": {"zero_stage": stage, "precision": precision, "micro_batch": 2, "device": "cpu"},
            "ema": [profile.model_dump() for profile in PROFILES],
            "guard": {"spike_factor": 100.0, "horizon_steps": 1},
            "log": {"every_steps": LOG_EVERY},
        }
    )


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "precision", "clipping"), DEEPSPEED_READS)
def test_host_reads_of_a_training_run(tmp_path: Path, stage: int, precision: str, clipping: bool) -> None:
    write_latents(tmp_path / "latents", num=8)
    theirs = DEEPSPEED_READS[stage, precision, clipping]
    expected = OUR_VOTE | {("deepspeed.runtime.utils", name): LOG_EVERY for name in theirs}
    for watch in run(2, watch_training, config_of(tmp_path, 2, stage, precision, clipping)):
        assert watch.reads == expected
        assert watch.waits == {where: LOG_EVERY * n for where, n in DEEPSPEED_WAITS[stage, precision].items()}
        assert not watch.uploads
        assert not watch.autocast
        assert watch.operators[EMA_PASS] == LOG_EVERY * len(PROFILES)


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("clipping", [False, True])
def test_a_single_process_never_waits(tmp_path: Path, precision: str, clipping: bool) -> None:
    write_latents(tmp_path / "latents", num=8)
    (watch,) = run(1, watch_training, config_of(tmp_path, 1, 2, precision, clipping))
    assert watch.reads == OUR_VOTE
    assert not watch.waits + watch.uploads + watch.autocast
    assert watch.operators[EMA_PASS] == LOG_EVERY * len(PROFILES)


def meta_batch(num: int, side: int) -> MicroBatch:
    return MicroBatch(
        torch.empty(num, 8, side, side, dtype=torch.float16, device=META),
        torch.empty(num, dtype=torch.int64, device=META),
        torch.empty(num, dtype=torch.int64, device=META),
        torch.empty(num, device=META),
    )


@pytest.mark.parametrize("read", [bool, int, float, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu])
def test_the_meta_device_has_no_numbers(read: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        read(torch.empty((), device=META))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_objective_reads_nothing_back(dtype: torch.dtype) -> None:
    model = dit.build(ModelConfig(name="DiT-Ti/2", image_size=32), 0, META, initialise=False).to(dtype)
    schedule = schedules.linear(1000).to(META)
    batch = meta_batch(4, side=4)
    sums = losses(
        model, schedule, batch, seed=0, latent_scale=0.18215, null_class=1000, label_dropout=0.1
    ).sums(batch.weight_B)
    sums[0].backward()
    assert sums.device == META
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_meters_read_nothing_until_a_log_point() -> None:
    meters = Meters()
    for _ in range(3):
        meters.add(torch.empty(len(COLUMNS) + len(SAMPLE_COLUMNS), device=META))


@pytest.mark.parametrize("spike_factor", [0.0, 3.0])
def test_the_guard_neither_reads_nor_uploads_numbers(spike_factor: float) -> None:
    guard = Guard(GuardConfig(spike_factor=spike_factor), META)
    watch = Watch()
    watch.on = True
    with Operators(watch), Calls(watch):
        verdicts = [guard.judge(*torch.empty(2, device=META)) for _ in range(3)]
    assert {(verdict.device, verdict.dtype, verdict.shape) for verdict in verdicts} == {
        (META, torch.float32, ())
    }
    assert not watch.reads
    assert not watch.uploads


@pytest.mark.parametrize("num_partitions", [1, 3])
def test_an_update_of_the_averages_is_one_fused_pass_per_profile(num_partitions: int) -> None:
    partitions = tuple(
        Partition({MASTER: torch.empty(size, device=META)}, (ParameterSlice("w", 0, size, 0),))
        for size in range(5, 5 + num_partitions)
    )
    ema = Ema(PROFILES, partitions)
    ema.start()
    watch = Watch()
    watch.on = True
    with Operators(watch):
        ema.update(1)
    assert watch.operators.pop(EMA_PASS) == len(PROFILES)
    assert set(watch.operators) <= {"aten.detach.default", "aten.alias.default"}  # views, without kernels
