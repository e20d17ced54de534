"""Benchmark denoising: images/s of our loop beside the usual kind of loop, at equal steps and equal quality.

    python -m benchmarks.sample --model DiT-XL/2 --image-size 256 --batch 32
    python -m benchmarks.sample --model DiT-S/4 --batch 8 --compile
    python -m benchmarks.sample --smoke

The usual loop is written here from the equations: eager, one timestep at a time, a doubled batch throughout
(the null half gets noise and updates too), tables moved from the host in every step. Both loops run the
same model in fp32 with guidance 1.5 on three channels; decoding is excluded. A measurement is one whole
trajectory of --timed-steps; loops take turns, and each figure is the median over --rounds. With one thread
on a CPU it is CPU time, which other programs disturb less. The usual loop has a process of its own with
default settings; ours is prepared as `dit-scale sample` prepares it (dit_scale/host_memory.py).

"guidance off" are steps outside of the guidance interval. --compile adds the loops with compiled blocks, the
usual loop included.

images/s follows from the time of a step and the number of steps. Equal steps: 250 for both. Equal quality:
--fast-steps of DPM-Solver++(2M) beside 250 of DDPM; `python -m benchmarks.solvers` measures the quality.

Shapes: B images, C latent channels, H W latent sides, 2C eps then v channels, D = 2B.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from statistics import median
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.train_step import cpu_name, versions
from dit_scale import dist, host_memory, vae
from dit_scale.config import ModelConfig
from dit_scale.diffusion.schedule import float64_tables, linear, respace
from dit_scale.models.dit import DiT, build
from dit_scale.sampling.denoise import denoise, sampling_schedule
from dit_scale.sampling.settings import SamplingSettings

STEPS = 250
GUIDANCE, GUIDED_CHANNELS = 1.5, 3
INTERVAL = (200, 600)
"""Guided timesteps of the row with an interval: about 40 % of a trajectory."""
TIMESTEPS = 1000
NOWHERE = (TIMESTEPS, TIMESTEPS)
"""An interval that contains no timestep: every step is one without guidance."""
USUAL, COMPILED = "usual loop, ddpm", ", compiled"
OURS: dict[str, dict[str, Any]] = {
    "ours, ddpm": {"method": "ddpm"},
    "ours, ddpm, interval": {"method": "ddpm", "guidance_interval": INTERVAL},
    "ours, ddpm, guidance off": {"method": "ddpm", "guidance_interval": NOWHERE},
    "ours, dpmpp_2m": {"method": "dpmpp_2m"},
}
"""Our loops, by name: what differs from the default settings."""
SMOKE = {"model": "DiT-Nano/2", "image_size": 32, "batch": 4, "timed_steps": 4, "rounds": 2}
PACKAGES = ("dit-scale", "torch")

Row = dict[str, Any]
Loop = Callable[[], Iterator[Tensor]]
"""Starts a trajectory of --timed-steps and yields x after each step."""


def main() -> int:
    """Measure all loops and print them."""
    parser = _parser()
    args = parser.parse_args()
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args()
    device = torch.device(args.device)
    seconds = measure(args)
    rows = [_row(name, seconds, args) for name in seconds]
    if args.json:
        for row in rows:
            print(json.dumps(row))
    Console(stderr=args.json, soft_wrap=True).print(_table(rows, args, device))
    return 0


def names(compile: bool) -> list[str]:
    """Return the names of all loops in their order."""
    eager = [USUAL, *OURS]
    return eager + [f"{name}{COMPILED}" for name in eager] if compile else eager


def loops(model: DiT, batch: int, steps: int, device: torch.device) -> dict[str, Loop]:
    """Return every loop by name."""
    model.eval().requires_grad_(False)
    y_B = torch.arange(batch, device=device) % model.shape.num_classes
    image_B = torch.arange(batch, device=device)

    def ours(**changes: Any) -> Loop:
        settings = SamplingSettings(steps=str(steps), guidance=GUIDANCE, **changes)
        schedule = sampling_schedule(TIMESTEPS, settings, device)
        return lambda: denoise(model, schedule, y_B, image_B, settings)

    return {
        USUAL: lambda: usual_ddpm(model, steps, y_B),
        **{name: ours(**changes) for name, changes in OURS.items()},
    }


@torch.no_grad()
def usual_ddpm(model: DiT, steps: int, y_B: Tensor) -> Iterator[Tensor]:
    """Sample as usual training repositories do; yields x_DCHW after each step."""
    schedule, device = respace(linear(TIMESTEPS), str(steps)), y_B.device
    tables = float64_tables(schedule.betas_float64)
    timesteps_S = schedule.timesteps.numpy()
    y_D = torch.cat([y_B, torch.full_like(y_B, model.shape.num_classes)])
    side, channels = model.shape.latent_size, model.shape.in_channels
    x_BCHW = torch.randn(len(y_B), channels, side, side, device=device)
    x_DCHW = torch.cat([x_BCHW, x_BCHW])

    def table(name: str, t_D: Tensor) -> Tensor:
        values_D = torch.from_numpy(tables[name]).to(device)[t_D].float()
        return values_D[:, None, None, None].expand_as(x_DCHW)

    for index in reversed(range(steps)):
        t_D = torch.tensor([index] * len(y_D), device=device)
        half_BCHW = x_DCHW[: len(y_B)]
        model_t_D = torch.tensor(np.asarray(timesteps_S), device=device)[t_D]
        output_D2CHW = model(torch.cat([half_BCHW, half_BCHW]), model_t_D, y_D)
        guided, rest = output_D2CHW[:, :GUIDED_CHANNELS], output_D2CHW[:, GUIDED_CHANNELS:]
        labelled, null = guided.chunk(2)
        eps = null + GUIDANCE * (labelled - null)  # Ho & Salimans 2022, eq. 6
        eps_DCHW, v_DCHW = torch.cat([torch.cat([eps, eps]), rest], dim=1).chunk(2, dim=1)
        upper, lower = table("log_betas", t_D), table("posterior_log_variance_clipped", t_D)
        fraction_DCHW = (v_DCHW + 1) / 2  # Nichol & Dhariwal 2021, eq. 15
        log_variance_DCHW = fraction_DCHW * upper + (1 - fraction_DCHW) * lower
        x_start_DCHW = (  # Ho et al. 2020, eq. 15
            table("sqrt_recip_alphas_cumprod", t_D) * x_DCHW
            - table("sqrt_recipm1_alphas_cumprod", t_D) * eps_DCHW
        )
        mean_DCHW = (  # Ho et al. 2020, eq. 7
            table("posterior_mean_coef_start", t_D) * x_start_DCHW
            + table("posterior_mean_coef_t", t_D) * x_DCHW
        )
        not_last_D111 = (t_D != 0).float()[:, None, None, None]
        noise_DCHW = torch.randn_like(x_DCHW)
        x_DCHW = mean_DCHW + not_last_D111 * torch.exp(0.5 * log_variance_DCHW) * noise_DCHW
        yield x_DCHW


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds per step of each loop; the loops take turns, after one round of warm-up.

    The usual loop runs in a process of its own, because ours prepares its process as `dit-scale sample` does.
    """
    spawn, seconds = multiprocessing.get_context("spawn"), defaultdict[str, list[float]](list)
    with spawn.Pool(1, _begin, (args, False)) as usual, spawn.Pool(1, _begin, (args, True)) as ours:
        for _ in range(args.rounds + 1):
            for name in names(args.compile):
                process = usual if name.startswith(USUAL) else ours
                seconds[name].append(process.apply(_time, (name,)))
    return {name: median(values[1:]) for name, values in seconds.items()}


_process: dict[str, Any] = {}
"""The loops of this process, and how to time them."""


def _begin(args: argparse.Namespace, is_ours: bool) -> None:
    """Build all loops in this process."""
    if is_ours:
        host_memory.use_huge_pages()
        dist.compute_on_cpu(args.threads)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model = build(ModelConfig(name=args.model, image_size=args.image_size), seed=0, device=device)
    _process["loops"] = loops(model, args.batch, args.timed_steps, device)
    if args.compile:
        compiled = deepcopy(model)
        compiled.compile_blocks(dynamic=False, options=vae.FIXED_CHOICES)  # as `dit-scale sample --compile`
        again = loops(compiled, args.batch, args.timed_steps, device)
        _process["loops"] |= {f"{name}{COMPILED}": loop for name, loop in again.items()}
    is_cpu_time = args.device == "cpu" and args.threads == 1
    _process["clock"] = time.process_time if is_cpu_time else time.perf_counter
    _process["device"] = device


def _time(name: str) -> float:
    """Seconds per step of one trajectory."""
    device, clock = _process["device"], _process["clock"]
    _synchronize(device)
    started = clock()
    steps = sum(1 for _ in _process["loops"][name]())
    _synchronize(device)
    return float(clock() - started) / steps


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(name: str, seconds: dict[str, float], args: argparse.Namespace) -> Row:
    steps = args.fast_steps if "2m" in name else STEPS
    images_per_s = args.batch / (steps * seconds[name])

    def ratio(usual: str) -> float | None:
        return STEPS * seconds[usual] / (steps * seconds[name]) if usual in seconds else None

    return {
        "model": args.model,
        "image_size": args.image_size,
        "batch": args.batch,
        "loop": name,
        "step_s": seconds[name],
        "steps": steps,
        "images_per_s": images_per_s,
        "ratio": ratio(USUAL),
        "ratio_to_compiled": ratio(f"{USUAL}{COMPILED}"),
        "versions": versions(PACKAGES),
    }


def _table(rows: list[Row], args: argparse.Namespace, device: torch.device) -> Table:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    table = Table(
        title=f"Denoising with {args.model} at {args.image_size} px, fp32, batch {args.batch}, "
        f"guidance {GUIDANCE}; the interval is {INTERVAL[0]} to {INTERVAL[1]}",
        caption=f"{name}\n{' '.join(f'{package} {v}' for package, v in versions(PACKAGES).items())}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("loop")
    columns = ("ms/step", "steps", "images/s", "ratio", *(["to compiled"] if args.compile else []))
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["loop"],
            f"{row['step_s'] * 1e3:,.2f}",
            str(row["steps"]),
            f"{row['images_per_s']:,.3f}",
            f"{row['ratio']:.2f}",
            *([f"{row['ratio_to_compiled']:.2f}"] if args.compile else []),
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="DiT-XL/2", help="(default DiT-XL/2)")
    parser.add_argument("--image-size", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--batch", type=int, default=32, help="images per forward pass (default 32)")
    parser.add_argument("--timed-steps", type=int, default=20, help="steps per trajectory (default 20)")
    parser.add_argument("--fast-steps", type=int, default=20, help="steps of dpmpp_2m (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="trajectories per loop (default 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--compile", action="store_true", help="add the loops with compiled blocks")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument(
        "--smoke", action="store_true", help="run a tiny model on a CPU to check that the benchmark works"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
