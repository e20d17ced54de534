"""Time the draws on this machine: the plain version and what `dit_scale.rng` selects, one after the other.

    python -m benchmarks.draws                       # on a CPU: CPU time
    python -m benchmarks.draws --device cuda         # time of the device's stream
    python -m benchmarks.draws --smoke               # a few positions: checks that it works

Medians of alternating repetitions, with the positions of one micro-batch.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_scale import rng
from dit_scale.rng import Purpose, plain

WARMUP = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", help="(default cpu)")
    parser.add_argument("--batch", type=int, default=32, help="positions (default 32)")
    parser.add_argument("--repeats", type=int, default=15, help="timed repetitions (default 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--smoke", action="store_true", help="draw for 2 positions, twice")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.repeats = 2, 2
    torch.set_num_threads(1)
    device = torch.device(args.device)
    position_N = torch.arange(args.batch, device=device)
    title = f"{args.batch} positions, {rng.backend(device)} instead of torch; torch {torch.__version__}"
    table = Table("draw", "plain, us", "selected, us", "ratio", box=box.SIMPLE, title=title)
    for name, drawings in cases(position_N).items():
        before_s, after_s = compare(drawings, device, args.repeats)
        table.add_row(name, f"{before_s * 1e6:.0f}", f"{after_s * 1e6:.0f}", f"{before_s / after_s:.2f}")
        if args.json:
            print(json.dumps({"draw": name, "plain_us": before_s * 1e6, "us": after_s * 1e6}), flush=True)
    Console(width=120, stderr=args.json).print(table)
    return 0


def cases(position_N: Tensor) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Draw => its plain version, and the one that training uses."""

    def normals(size: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        count = 4 * size**2
        return (
            lambda: plain.normals(position_N, 1, int(Purpose.NOISE), count, 0),
            lambda: rng.normals(1, Purpose.NOISE, position_N, (count,)),
        )

    return {
        "integers": (
            lambda: plain.integers(position_N, 1, int(Purpose.TIMESTEP), 1000),
            lambda: rng.integers(1, Purpose.TIMESTEP, position_N, 1000),
        ),
        "normals 4 x 8 x 8": normals(8),
        "normals 4 x 32 x 32": normals(32),
        "normals 4 x 64 x 64": normals(64),
    }


def compare(
    drawings: tuple[Callable[[], Tensor], Callable[[], Tensor]], device: torch.device, repeats: int
) -> tuple[float, float]:
    """Return the median seconds of both drawings, which alternate."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(WARMUP + repeats):
        for draw, seconds in zip(drawings, times, strict=True):
            started = _now_s(device)
            draw()
            if repeat >= WARMUP:
                seconds.append(_now_s(device) - started)
    return median(times[0]), median(times[1])


def _now_s(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
