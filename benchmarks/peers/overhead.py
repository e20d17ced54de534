"""Measure what the training loop adds to the trainer: CPU time of the main thread per step, outside of it.

    python -m benchmarks.peers.overhead
    python -m benchmarks.peers.overhead --processes 2 --steps 500

It trains a real run of a tiny model on a real data set of random latents, with heartbeats, and times each
step from the end of one update to the end of the next. What remains after subtracting the time inside
`Trainer.accumulate` and `Trainer.update` is the loop: taking a prefetched micro-batch, the vote, the
heartbeats, meters, status line, and every --log-every steps a log point. CPU time of one thread, because
waiting for a batch, a vote or a core is not work. The first tenth of the steps is warm-up.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.step_parts import free_port
from benchmarks.train_step import cpu_name, versions
from dit_scale.config import TrainConfig
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.heartbeat import FOLDER_VARIABLE
from dit_scale.train.loop import train
from dit_scale.train.trainer import Trainer
from tests.support.latents import write_latents

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one row."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_latents(folder / "data", num=64)
        config = TrainConfig.model_validate(
            {
                "run": str(folder / "run"),
                "steps": args.steps,
                "global_batch": args.processes,
                "model": {"name": "DiT-Nano/2", "image_size": 32, "num_classes": 10},
                "data": {"url": str(folder / "data")},
                "engine": {"zero_stage": 1, "precision": "fp32", "device": "cpu"},
                "log": {"every_steps": args.log_every},
            }
        )
        port = free_port()
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            answers = [
                pool.apply_async(measure, (rank, args.processes, port, config))
                for rank in range(args.processes)
            ]
            loop_s, batch_s, trainer_s = answers[0].get()
            pool.close()
            pool.join()  # the ranks catch SIGTERM, by which leaving the context would end them
    row: Row = {
        "steps": len(loop_s),
        "processes": args.processes,
        "log_every": args.log_every,
        "loop_s": median(loop_s),
        "loop_mean_s": mean(loop_s),
        "loop_log_point_s": mean(sorted(loop_s)[-max(1, len(loop_s) // args.log_every) :]),
        "batch_s": median(batch_s),
        "trainer_s": median(trainer_s),
        "device": cpu_name(),
        "versions": versions(),
    }
    print(json.dumps(row) if args.json else _text(row))
    return 0


def measure(
    rank: int, num_ranks: int, port: int, config: TrainConfig
) -> tuple[list[float], list[float], list[float]]:
    """Train as one rank; returns the CPU seconds of each step: loop (with batches), batches, trainer."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ[FOLDER_VARIABLE] = str(Path(config.run).parent)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accumulate, update = Trainer.accumulate, Trainer.update
    ends, batch_s, trainer_s = [], [0.0], [0.0]

    def timed_batches(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        while True:
            started = time.thread_time()
            batch = next(batches)
            batch_s[-1] += time.thread_time() - started
            yield batch

    def timed(function: Callable[..., torch.Tensor], trainer: Trainer, *args: Any) -> torch.Tensor:
        started = time.thread_time()
        result = function(trainer, *args)
        trainer_s[-1] += time.thread_time() - started
        return result

    def timed_accumulate(trainer: Trainer, batches: Iterator[MicroBatch], *args: Any) -> torch.Tensor:
        return timed(accumulate, trainer, timed_batches(batches), *args)

    def timed_update(trainer: Trainer, *args: Any) -> torch.Tensor:
        row = timed(update, trainer, *args)
        trainer_s[-1] -= batch_s[-1]
        ends.append(time.thread_time())
        batch_s.append(0.0)
        trainer_s.append(0.0)
        return row

    with patch.object(Trainer, "accumulate", timed_accumulate), patch.object(Trainer, "update", timed_update):
        train(config)
    warmup = max(1, config.steps // 10)
    steps = range(warmup, config.steps)
    loop_s = [ends[step] - ends[step - 1] - trainer_s[step] for step in steps]
    return loop_s, [batch_s[step] for step in steps], [trainer_s[step] for step in steps]


def _text(row: Row) -> str:
    us = {name: f"{row[name] * 1e6:.0f}" for name in row if name.endswith("_s")}
    return (
        f"the loop adds {us['loop_s']} us of CPU time to a step (mean {us['loop_mean_s']}; "
        f"{us['batch_s']} to take a batch; {us['loop_log_point_s']} in a step with a log point, every "
        f"{row['log_every']} steps), the trainer takes {us['trainer_s']} us with DiT-Nano/2; "
        f"{row['processes']} process(es), {row['steps']} steps, {row['device']}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=1000, help="(default 1000)")
    parser.add_argument("--log-every", type=int, default=100, help="steps between log points (default 100)")
    parser.add_argument("--processes", type=int, default=1, help="(default 1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
