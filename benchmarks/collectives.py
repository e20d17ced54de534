"""Time the collectives of an optimizer step on a CPU, without anything else: what ZeRO cannot be faster than.

    python -m benchmarks.collectives --model DiT-S/4
    python -m benchmarks.collectives --smoke

All-reduce of fp32 gradients and all-gather of fp32 weights, on gloo between processes of one thread on
this machine. Medians over the repetitions, on rank 0.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import distributed
from torch.distributed import TCPStore

from benchmarks.train_step import versions
from dit_scale.config import ModelConfig
from dit_scale.models.zoo import num_parameters, shape_of

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="DiT-S/4", help="(default DiT-S/4)")
    parser.add_argument("--processes", type=int, default=2, help="(default 2)")
    parser.add_argument("--repeats", type=int, default=15, help="timed repetitions (default 15)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, twice")
    args = parser.parse_args()
    if args.smoke:
        args.model, args.repeats = "DiT-Nano/2", 2
    count = num_parameters(shape_of(ModelConfig(name=args.model)))
    count += -count % args.processes
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        answers = [
            pool.apply_async(measure, (rank, args.processes, store.port, count, args.repeats))
            for rank in range(args.processes)
        ]
        rows, *_ = [answer.get() for answer in answers]
    for row in rows:
        print(json.dumps({"model": args.model, "processes": args.processes, **row, "versions": versions()}))
    return 0


def measure(rank: int, world: int, port: int, count: int, repeats: int) -> list[Row]:
    """Return a row per collective over `count` fp32 elements, as rank `rank` saw it."""
    torch.set_num_threads(1)
    store = TCPStore("localhost", port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    whole, part = torch.zeros(count), torch.zeros(count // world)
    cases: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: distributed.all_reduce(whole),
        "all-gather": lambda: distributed.all_gather_single(whole, part),
    }
    rows = []
    for name, run in cases.items():
        wall_s, cpu_s = zip(*(timed(run) for _ in range(repeats)), strict=True)
        rows.append(
            {
                "collective": name,
                "bytes": 4 * count,
                "ms": round(1e3 * median(wall_s), 2),
                "cpu_ms": round(1e3 * median(cpu_s), 2),
            }
        )
    distributed.destroy_process_group()
    return rows


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of this process for one call that all ranks begin together."""
    distributed.barrier()
    begin_s, cpu_s = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - begin_s, time.process_time() - cpu_s


if __name__ == "__main__":
    sys.exit(main())
