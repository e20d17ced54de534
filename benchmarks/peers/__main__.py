"""Benchmark our training step side by side with the loops of other recipes, in one run.

    python -m benchmarks.peers                                # the three settings on a CPU, fp32
    python -m benchmarks.peers --precision fp32 bf16 --compile
    python -m benchmarks.peers --loops zero1 zero2 zero3 --processes 1 2
    PYTHONPATH=/path/to/DiT python -m benchmarks.peers --loops original reference zero1
    python -m benchmarks.peers --smoke

`benchmarks/peers/loops.py` describes the loops. Each has a process of its own, because DeepSpeed cannot start
twice in one. They take turns, with one thread each: A B C A B C ... A figure is the median over the turns; a
ratio is the median of the ratios within a round, by images/s. On a CPU a second ratio counts CPU time, which
depends less on what else the machine does. A GPU may lack room for all loops at once: there they run one
after the other.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.peers.loops import COMPILE, LOOPS, Setting
from benchmarks.peers.workers import Loop, Slice, loops, measure
from benchmarks.train_step import cpu_name, versions

SETTINGS = {"ti": ("DiT-Ti/2", 64, 32), "s": ("DiT-S/4", 256, 8), "b": ("DiT-B/4", 256, 4)}
"""Name => model, image size, images per step and process."""
DEFAULT_LOOPS = ("original", "fast", "bare", "zero2")
COMPILED_LOOPS = ("original", "bare", "zero1", "zero2")
BASELINES = {"times_original": "original", "times_fast": "fast", "times_bare": "bare"}
SMOKE: dict[str, Any] = {"settings": ["smoke"], "warmup": 1, "rounds": 2, "steps": 1}

Row = dict[str, Any]
"""Settings and figures of one loop; on failure, `problem` has the reason and there are no figures."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print every setting. Returns 0 if at least one row has figures, else 1."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args(argv)
    console = Console(stderr=args.json, soft_wrap=True)
    rows: list[Row] = []
    for name in args.settings:
        for precision in args.precision:
            model, image_size, batch = ("DiT-Nano/2", 32, 2) if name == "smoke" else SETTINGS[name]
            setting = Setting(
                args.model or model,
                args.image_size or image_size,
                args.batch or batch,
                precision=precision,
                device=args.device,
            )
            found = compare(setting, args)
            rows += found
            if args.json:
                for row in found:
                    print(json.dumps(row), flush=True)
            console.print(_table(found))
            for row in found:
                if "problem" in row:
                    console.print(f"{row['loop']}: {row['problem']}", markup=False, highlight=False)
    return int(all("problem" in row for row in rows))


def compare(setting: Setting, args: argparse.Namespace) -> list[Row]:
    """Measure all loops of a setting; one row per loop, in the order of the loops."""
    names = list(args.loops)
    if args.compile:
        names += [name + COMPILE for name in names if name in COMPILED_LOOPS]
    on_cuda = setting.device == "cuda"
    found: list[tuple[Loop, list[Slice]]] = []
    for together in [[name] for name in names] if on_cuda else [names]:
        with loops(together, setting, args.processes) as started:
            found += measure(started, warmup=args.warmup, rounds=args.rounds, steps=args.steps)
    baselines = {
        key: slices
        for key, name in BASELINES.items()
        for loop, slices in found
        if (loop.name, loop.num_processes) == (name, 1) and slices
    }
    device = torch.cuda.get_device_name() if on_cuda else cpu_name()
    return [_row(loop, slices, baselines) | {"device": device} for loop, slices in found]


def _row(loop: Loop, slices: list[Slice], baselines: dict[str, list[Slice]]) -> Row:
    row: Row = {
        "loop": loop.name,
        "processes": loop.num_processes,
        **vars(loop.setting),
        "versions": versions(),
    }
    if loop.problem:
        return row | {"problem": loop.problem}
    step_s = median(one.wall_s for one in slices)
    row |= {
        "turns": len(slices),
        "step_s": step_s,
        "cpu_s": median(one.cpu_s for one in slices),
        "images_per_s": loop.num_processes * loop.setting.batch / step_s,
    }
    for key, baseline in baselines.items():
        pairs = list(zip(baseline, slices, strict=True))
        row[key] = loop.num_processes * median(base.wall_s / one.wall_s for base, one in pairs)
        if loop.setting.device == "cpu":
            row[f"{key}_cpu"] = loop.num_processes * median(base.cpu_s / one.cpu_s for base, one in pairs)
    return row


def _table(rows: list[Row]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first['model']} at {first['image_size']} px, {first['batch']} images per process and step, "
        f"ours and bare in {first['precision']}",
        title_justify="left",
        caption=f"{first['device']}\n{' '.join(f'{name} {v}' for name, v in first['versions'].items())}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("loop", no_wrap=True)
    on_cpu = any(key.endswith("_cpu") for row in rows for key in row)
    for column in ("ms/step", "CPU ms", "images/s", *(key.replace("_", " ") for key in BASELINES)):
        by_cpu = " (by CPU time)" if on_cpu and column.startswith("times") else ""
        table.add_column(column + by_cpu, justify="right")
    for row in rows:
        name = f"{row['loop']} x {row['processes']}" if row["processes"] > 1 else row["loop"]
        table.add_row(name, *(["no figures"] if "problem" in row else _cells(row)))
    return table


def _cells(row: Row) -> list[str]:
    cells = [f"{row['step_s'] * 1e3:,.1f}", f"{row['cpu_s'] * 1e3:,.1f}", f"{row['images_per_s']:,.2f}"]
    for key in BASELINES:
        on_cpu = f" ({row[f'{key}_cpu']:.2f})" if f"{key}_cpu" in row else ""
        cells.append(f"{row[key]:.2f}{on_cpu}" if key in row else "")
    return cells


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS), help="(default: all)"
    )
    parser.add_argument("--model", help="another model than the setting's")
    parser.add_argument("--image-size", type=int, help="another image size than the setting's, in pixels")
    parser.add_argument("--batch", type=int, help="another batch than the setting's, per process")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument(
        "--loops",
        nargs="+",
        default=list(DEFAULT_LOOPS),
        metavar="LOOP",
        help=f"of {', '.join(LOOPS)} (default: {' '.join(DEFAULT_LOOPS)}); NAME{COMPILE} compiles its blocks",
    )
    parser.add_argument("--compile", action="store_true", help="measure each loop with compiled blocks, too")
    parser.add_argument(
        "--processes", nargs="+", type=int, default=[1], help="processes of our loops (default 1)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first turn (default 3)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each loop (default 7)")
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn (default 2)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per row, and tables to standard error"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="run a tiny model to check that the benchmark works"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
