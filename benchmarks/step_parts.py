"""Break down the time of a training step on a CPU, by part of the step and by operator.

    python -m benchmarks.step_parts configs/demo.yaml --processes 2
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m benchmarks.step_parts configs/demo.yaml

It runs real training steps on random latents, as benchmarks/train_step.py does, and times each part of
the step with the host clock. A CPU executes the parts one after the other, so they add up to the step.
Figures are medians over the steps of rank 0. The operator times come from a torch profile of additional
steps.
"""

import argparse
import multiprocessing
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.train_step import LATENT_SCALE, cpu_name, random_batch, versions
from dit_scale import dist, rng
from dit_scale.config import TrainConfig, load
from dit_scale.dist import World
from dit_scale.models.zoo import shape_of
from dit_scale.train import determinism, objective
from dit_scale.train.ema import Ema
from dit_scale.train.engine import Engine
from dit_scale.train.memory import plan_of
from dit_scale.train.trainer import Trainer

PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "draws": ((rng, "normals"), (rng, "integers"), (rng, "uniforms")),
    "forward pass": ((Engine, "__call__"),),
    "noising and loss": ((objective, "q_sample"), (objective, "hybrid_loss")),
    "backward pass, reduction of gradients": ((Engine, "backward"),),
    "sum of the losses over ranks": ((World, "sum"),),
    "AdamW, new weights to all ranks": ((Engine, "step"),),
    "moving averages": ((Ema, "update"),),
}
"""Part => functions whose time it contains; none of them calls another."""
WARMUP_STEPS, SHOWN_OPERATORS = 5, 12

Times = dict[str, list[float]]
"""Part => seconds in each step."""
Operators = dict[str, float]
"""Operator => seconds per step, excluding the operators that it calls."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="recipe name or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    parser.add_argument("--processes", type=int, default=1, help="(default 1)")
    parser.add_argument(
        "--steps", type=int, default=30, help="timed steps; as many are profiled (default 30)"
    )
    args = parser.parse_args()
    config = load(TrainConfig, args.config, [*args.overrides, "engine.device=cpu"])
    port = free_port()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        answers = [
            pool.apply_async(measure, (rank, args.processes, port, config, args.steps))
            for rank in range(args.processes)
        ]
        (precision, times, operators), *_ = [answer.get() for answer in answers]
    title = f"{args.config} in {precision} on {args.processes} x CPU, {config.global_batch} images per step"
    show(title, times, operators)
    return 0


def free_port() -> int:
    """Return a free TCP port of this host."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def measure(
    rank: int, num_ranks: int, port: int, config: TrainConfig, steps: int
) -> tuple[str, Times, Operators]:
    """Run the steps as one rank; return the precision, the times of the parts and those of the operators."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    determinism.pin(config.engine)
    world = dist.start(config.engine)
    try:
        precision = dist.choose_precision(config.engine.precision, world.device)
        engine = config.engine.model_copy(update={"precision": precision})
        config = config.model_copy(update={"engine": engine})
        plan, shape = plan_of(config, world.size), shape_of(config.model)
        trainer = Trainer(config, world, plan, LATENT_SCALE)
        trainer.start()
        batches = cycle([random_batch(shape, plan.micro_batch, i) for i in range(plan.micro_steps)])
        for number in range(WARMUP_STEPS):
            trainer.take(batches, number)
        times: Times = defaultdict(list)
        for number in range(steps):
            with timed(times):
                trainer.take(batches, number)
        return precision, dict(times), profiled(lambda: trainer.take(batches, 0), steps)
    finally:
        dist.stop()


@contextmanager
def timed(times: Times) -> Iterator[None]:
    """Measure the step inside the context, and append its seconds and those of each part to `times`."""
    spent: dict[str, float] = defaultdict(float)

    def timed_part(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **keywords)
            finally:
                spent[part] += time.perf_counter() - started

        return call

    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, timed_part(part, getattr(owner, name))))
        started = time.perf_counter()
        yield
        times["step"].append(time.perf_counter() - started)
    for part in PARTS:
        times[part].append(spent[part])


def profiled(take: Callable[[], object], steps: int) -> Operators:
    """Profile steps and return each operator's seconds per step, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            take()
    seconds = {row.key: row.self_cpu_time_total / 1e6 / steps for row in profile.key_averages()}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def show(title: str, times: Times, operators: Operators) -> None:
    """Print both tables."""
    step_s = median(times["step"])
    parts = {part: median(seconds) for part, seconds in times.items() if part != "step"}
    parts["everything else"] = step_s - sum(parts.values())
    caption = f"{cpu_name()}  " + " ".join(f"{name} {version}" for name, version in versions().items())
    console = Console(soft_wrap=True)
    _print(console, title, "part of the step", {**parts, "whole step": step_s}, step_s)
    total = sum(operators.values())
    shown = dict(list(operators.items())[:SHOWN_OPERATORS])
    shown[f"{len(operators) - len(shown)} others"] = total - sum(shown.values())
    _print(console, "by operator, under the profiler", "operator", shown, total)
    console.print(caption, highlight=False)


def _print(console: Console, title: str, kind: str, seconds: dict[str, float], step_s: float) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(kind, no_wrap=True)
    for column in ("ms", "share"):
        table.add_column(column, justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value * 1e3:.2f}", f"{value / step_s:.1%}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
