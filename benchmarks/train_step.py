"""Benchmark a training step: images/s, model FLOP/s, and their ratio to a measured matrix product.

    python -m benchmarks.train_step --model DiT-XL/2 --image-size 256 --compile --attention all
    python -m benchmarks.train_step --smoke

It runs the step of real training on one device: copy of the micro-batch to the device, draws, noising,
forward and backward pass, guard, AdamW, moving averages and meters. Latents are random numbers in host
memory; reading data, logging and checkpoints are excluded.

Every figure is a median over the steps, measured between marks after each step: CUDA events on a GPU, the
host clock on a CPU. Model FLOPs are 6 x the multiply-adds of one forward pass, so recomputation does not
count. The matrix product, 8192^3 random numbers of the same type (1024^3 on a CPU), is measured in the
same process immediately after the steps, while the device is warm.

The update (guard, AdamW, new weights, moving averages) is also measured alone, beside a copy within the
device's memory: its share is the bytes that it must move per second, divided by those of the copy. Peak
memory stands beside the prediction of `dit_scale/train/memory.py`; on a CPU it is that of the complete
process. `logged` in the JSON has what the same steps put into a log point of a run.

Each row runs in its own process: DeepSpeed cannot start twice in one process, compiled code and
allocations of one row would affect the next, and a row that runs out of memory must not abort the others.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from dit_scale import dist
from dit_scale.config import EngineConfig, ModelConfig, OptimizerConfig, TrainConfig
from dit_scale.data.batch_plan import batch_plan
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.errors import DeviceError
from dit_scale.models import attention
from dit_scale.models.zoo import (
    FLOPS_PER_MAC,
    TRAINING_FORWARDS,
    Shape,
    forward_macs,
    num_parameters,
    shape_of,
)
from dit_scale.telemetry.clock import marker, median_s, seconds_between
from dit_scale.telemetry.matmul import matmul_flops_per_s
from dit_scale.telemetry.meters import Meters
from dit_scale.telemetry.pace import Pace, Work, over_ranks
from dit_scale.train import determinism
from dit_scale.train.memory import estimate
from dit_scale.train.trainer import Trainer

LATENT_SCALE = 0.18215
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = (
    "ms/step",
    "images/s",
    "TFLOP/s (matmul)",
    "share",
    "update ms (of a copy)",
    "peak GiB (predicted)",
)
PACKAGES = ("dit-scale", "torch", "triton", "deepspeed", "flash-attn", "flash-attn-4")
SMOKE = {
    "model": "DiT-Ti/2",
    "image_size": 32,
    "micro_batch": 2,
    "micro_steps": 2,
    "device": "cpu",
    "steps": 3,
    "warmup": 1,
    "matmul_side": 128,
}

Row = dict[str, Any]
"""Settings and figures of one measurement; on failure, `problem` has the reason and there are no figures."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print all requested rows. Returns 0 if at least one row has figures, else 1."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args(argv)
    names = _available_backends() if args.attention == "all" else args.attention.split(",")
    unknown = [name for name in names if name not in attention.BACKENDS]
    if unknown:
        parser.error(
            f"--attention {unknown[0]}: expected `all`, or a list of {', '.join(attention.BACKENDS)}"
        )
    rows = []
    for name in names:
        row = _settings(args, name) | _measure_in_process(args, name)
        rows.append(row)
        if args.json:
            print(json.dumps(row), flush=True)
    console = Console(stderr=args.json)
    console.print(_table(rows))
    for row in rows:
        if "problem" in row:
            console.print(
                f"{row['attention']}: {row['problem']}", markup=False, highlight=False, soft_wrap=True
            )
    return int(all("problem" in row for row in rows))


def measure(config: TrainConfig, warmup: int, matmul_side: int | None) -> Row:
    """Measure a configuration in this process; an exception becomes the row's `problem`."""
    try:
        return _figures(config, warmup, matmul_side)
    except Exception as error:  # any failure of this row must not abort the others
        return {"problem": "".join(traceback.format_exception_only(error)).splitlines()[0]}


def _figures(config: TrainConfig, warmup: int, matmul_side: int | None) -> Row:
    determinism.pin(config.engine)
    world = dist.start(config.engine)
    device = world.device
    try:
        plan = batch_plan(config.global_batch, config.engine.micro_batch, world.size)
        trainer = Trainer(config, world, plan, LATENT_SCALE)
        trainer.start()
        meters, pace = Meters(), Pace(device)
        shape = shape_of(config.model)
        batches = cycle([random_batch(shape, plan.micro_batch, i) for i in range(plan.micro_steps)])

        mark, updates = marker(device), []

        def marked() -> Iterator[MicroBatch]:
            while True:
                pace.waits()
                yield next(batches)

        def take() -> None:
            sums = trainer.accumulate(marked(), pace.computed)
            started = mark()
            row = trainer.update(sums, 0)
            pace.finished()
            meters.add(row)
            updates.append((started, mark()))

        for _ in range(warmup):
            take()
        if warmup:
            pace.take(0.0)
        step_s = median_s(take, 0, config.steps, device)
        logged, peak_memory_bytes = pace.take(0.0), _peak_memory_bytes(device)
        update_s = median(seconds_between(*marks) for marks in updates[-config.steps :])
        matmul = matmul_flops_per_s(DTYPES[config.engine.precision], device, matmul_side)
        images_per_s = config.global_batch / step_s
        flops_per_image = FLOPS_PER_MAC * TRAINING_FORWARDS * forward_macs(shape)
        work = Work(config.global_batch, flops_per_image, matmul)
        on_cuda = device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
            "steps": config.steps,
            "step_s": step_s,
            "images_per_s": images_per_s,
            "model_flops_per_image": flops_per_image,
            "model_flops_per_s": images_per_s * flops_per_image,
            "matmul_flops_per_s": matmul,
            "share_of_matmul": images_per_s * flops_per_image / matmul,
            "peak_memory_bytes": peak_memory_bytes,
            "predicted_memory_bytes": estimate(config, shape, plan).total,
            "logged": over_ranks([logged], work),
            **_update_figures(config, shape, update_s, device),
        }
    finally:
        dist.stop()


def _peak_memory_bytes(device: torch.device) -> int:
    """Peak of the GPU's tensors, or of the memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def random_batch(shape: Shape, micro_batch: int, index: int) -> MicroBatch:
    """Make a micro-batch like the loader's: moments of realistic magnitude and random classes."""
    generator = torch.Generator().manual_seed(index)
    size = (micro_batch, shape.in_channels, shape.latent_size, shape.latent_size)
    mean_BCHW = 5 * torch.randn(size, generator=generator)
    std_BCHW = torch.rand(size, generator=generator)
    return MicroBatch(
        torch.cat((mean_BCHW, std_BCHW), dim=1).to(torch.float16),
        torch.randint(shape.num_classes, (micro_batch,), generator=generator),
        index * micro_batch + torch.arange(micro_batch),
        torch.ones(micro_batch),
    )


def _update_figures(config: TrainConfig, shape: Shape, update_s: float, device: torch.device) -> Row:
    """Compare an update to a copy. Per parameter, AdamW reads its gradient and reads and writes master and
    moments, each average is read and written beside the master, and bf16 weights are cast from it."""
    bytes_per_parameter = 28 + 12 * len(config.ema) + (6 if config.engine.precision == "bf16" else 0)
    update_bytes = bytes_per_parameter * num_parameters(shape)
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), 3, 20, device)
    copy_bytes_per_s = 2 * COPY_BYTES[device.type] / copy_s
    return {
        "update_s": update_s,
        "update_bytes": update_bytes,
        "copy_bytes_per_s": copy_bytes_per_s,
        "update_share_of_copy": update_bytes / update_s / copy_bytes_per_s,
    }


def _settings(args: argparse.Namespace, backend: str) -> Row:
    return {
        "model": args.model,
        "image_size": args.image_size,
        "attention": backend,
        "micro_batch": args.micro_batch,
        "micro_steps": args.micro_steps,
        "precision": args.precision,
        "optimizer": args.optimizer,
        "compiled": args.compile,
        "determinism": args.determinism,
        "versions": versions(),
    }


def _measure_in_process(args: argparse.Namespace, backend: str) -> Row:
    try:
        config = _config(args, backend)
    except ValidationError as error:  # a backend that these settings exclude
        return {"problem": "; ".join(found["msg"] for found in error.errors())}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_print_to_stderr) as pool:
        try:
            return pool.submit(measure, config, args.warmup, args.matmul_side).result()
        except BrokenProcessPool:
            return {"problem": "the process was killed, possibly because host memory ran out"}


def _print_to_stderr() -> None:
    """Redirect standard output, which is reserved for rows, because libraries print to it."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def _config(args: argparse.Namespace, backend: str) -> TrainConfig:
    return TrainConfig(
        steps=args.steps,
        global_batch=args.micro_batch * args.micro_steps,
        model=ModelConfig(name=args.model, image_size=args.image_size, attention=backend),
        optimizer=OptimizerConfig(implementation=args.optimizer),
        engine=EngineConfig(
            precision=args.precision,
            micro_batch=args.micro_batch,
            device=args.device,
            compile_blocks=args.compile,
            determinism=args.determinism,
        ),
    )


def _available_backends() -> list[str]:
    names = []
    for name in attention.BACKENDS:
        try:
            attention.choose(name)
        except DeviceError as error:
            print(f"skipping {name}: {error}", file=sys.stderr)
        else:
            names.append(name)
    return names


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python, the installed packages and CUDA."""
    installed = {name: _version(name) for name in packages}
    found = {name: version for name, version in installed.items() if version}
    return {"python": platform.python_version(), **found, "cuda": torch.version.cuda or "none"}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """CPU model and number of torch threads."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} thread(s)"


def _table(rows: list[Row]) -> Table:
    first = rows[0]
    devices = {row["device"]: None for row in rows if "device" in row}
    versions = " ".join(f"{name} {version}" for name, version in first["versions"].items())
    table = Table(
        title=f"Training step of {first['model']} at {first['image_size']} px, {first['precision']}, "
        f"{first['micro_steps']} x {first['micro_batch']} images, "
        f"{'compiled' if first['compiled'] else 'not compiled'}, {first['determinism']}",
        caption="\n".join((*devices, versions)),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("attention", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["attention"], *_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    if "problem" in row:
        return ["no figures"]
    memory, predicted = row["peak_memory_bytes"], row["predicted_memory_bytes"]
    return [
        f"{row['step_s'] * 1e3:,.2f}",
        f"{row['images_per_s']:,.1f}",
        f"{row['model_flops_per_s'] / 1e12:,.4g} ({row['matmul_flops_per_s'] / 1e12:,.4g})",
        f"{row['share_of_matmul']:.1%}",
        f"{row['update_s'] * 1e3:,.2f} ({row['update_share_of_copy']:.0%})",
        f"{memory / 2**30:.1f} ({predicted / 2**30:.1f})",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="DiT-XL/2", help="(default DiT-XL/2)")
    parser.add_argument("--image-size", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--micro-batch", type=int, default=32, help="images per forward pass (default 32)")
    parser.add_argument("--micro-steps", type=int, default=1, help="forward passes per step (default 1)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--optimizer", default="torch", help="optimizer.implementation (default torch)")
    parser.add_argument("--determinism", choices=("strict", "fast"), default="strict")
    parser.add_argument("--compile", action="store_true", help="compile the blocks with torch.compile")
    parser.add_argument(
        "--attention", default="sdpa", help="comma-separated backends, or `all` that this machine can run"
    )
    parser.add_argument("--steps", type=int, default=30, help="timed steps (default 30)")
    parser.add_argument(
        "--warmup",
        type=int,
        default=10,
        help="warm-up steps (default 10); they also move the weights away from their initial zeros",
    )
    parser.add_argument(
        "--matmul-side", type=int, help="side of the matrices (default 8192 on CUDA, 1024 on a CPU)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per row, and the table to standard error"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="run a tiny model on a CPU to check that the benchmark works"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
