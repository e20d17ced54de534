"""Measure on a GPU everything that the documentation quotes, in less than ten minutes.

    python -m benchmarks.gpu --out runs/bench
    python -m benchmarks.gpu --smoke --out /tmp/bench    # tiny, on a CPU: checks that it works

Each part is another benchmark in a process of its own with a time budget. A part that fails or exceeds its
budget keeps the rows that it has printed, and gets a row with the reason. Writes `bench.json` (device,
driver, versions, and the command and all rows of each part) and `bench.md` (the table) to --out.

- train_256, train_512: DiT-XL/2 as the recipes train it, global batches 256 and 64: images/s, share of a
  matrix product, the update (AdamW and moving average) beside a copy, peak memory beside the prediction.
- attention: the step without compilation and without determinism, with every backend that this machine has.
- triton: the step with AdamW and moving average in one kernel.
- peers: our step beside the published loop in TF32, its bf16 variant, and a bare loop over our model.
- draws: timesteps and noise of a micro-batch, beside the version in torch's operators.
- sample: denoising steps beside the usual loop.
- encode: VAE encoding beside plain loops over diffusers' model.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.train_step import cpu_name, versions

PACKAGES = ("dit-scale", "torch", "triton", "deepspeed", "flash-attn", "flash-attn-4", "diffusers")
XL = ("--model", "DiT-XL/2", "--image-size")
NAMES = {"train_step": "attention", "peers": "loop", "sample": "loop", "encode": "setting", "draws": "draw"}
"""Benchmark => the key that names its rows."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A benchmark, its arguments on a GPU and in the short form, and its budget."""

    module: str
    arguments: tuple[str, ...]
    smoke: tuple[str, ...]
    budget_s: float

    def command(self, smoke: bool) -> list[str]:
        """Return the command without the interpreter."""
        arguments = ("--smoke", *self.smoke) if smoke else self.arguments
        return ["-m", f"benchmarks.{self.module}", *arguments, "--json"]


PARTS = {
    "train_256": Part(
        "train_step",
        (*XL, "256", "--micro-batch", "32", "--micro-steps", "8", "--compile", "--steps", "20"),
        (),
        budget_s=105,
    ),
    "train_512": Part(
        "train_step",
        (*XL, "512", "--micro-batch", "16", "--micro-steps", "4", "--compile", "--steps", "20"),
        ("--micro-steps", "1"),
        budget_s=105,
    ),
    "peers": Part(
        "peers",
        (*XL, "256", "--settings", "b", "--batch", "32", "--device", "cuda", "--precision", "bf16")
        + ("--loops", "original", "fast", "bare", "zero2", "bare+compile", "zero2+compile"),
        ("--loops", "original", "zero2"),
        budget_s=145,
    ),
    "attention": Part(
        "train_step",
        (*XL, "256", "--attention", "all", "--determinism", "fast", "--steps", "10", "--warmup", "5"),
        ("--attention", "sdpa_cudnn,sdpa_math"),
        budget_s=90,
    ),
    "triton": Part(
        "train_step",
        (*XL, "256", "--optimizer", "triton", "--steps", "10", "--warmup", "5"),
        ("--optimizer", "torch"),
        budget_s=40,
    ),
    "draws": Part("draws", ("--device", "cuda"), (), budget_s=20),
    "sample": Part(
        "sample",
        (*XL, "256", "--batch", "32", "--device", "cuda", "--timed-steps", "5", "--rounds", "2"),
        (),
        budget_s=45,
    ),
    "encode": Part(
        "encode",
        ("--parts", "encoder", "--image-sizes", "256", "--rounds", "2"),
        ("--parts", "encoder"),
        budget_s=45,
    ),
}
"""The parts in their order; the first ones matter most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts and write both files. Returns 0 if every part has figures, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="(default all)")
    parser.add_argument(
        "--budgets", type=float, default=1.0, help="multiply the time budgets, for a slow machine (default 1)"
    )
    parser.add_argument("--smoke", action="store_true", help="run the short form of every part on a CPU")
    args = parser.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use --smoke to check on a CPU that the benchmark works")
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    report: dict[str, Any] = {**machine(), "parts": {}}
    lines = [title(report), "", "| part | measurement | result | for comparison |", "|---|---|---|---|"]
    for name in args.parts:
        part = PARTS[name]
        command = part.command(args.smoke)
        console.print(f"{name}: python {shlex.join(command)}")
        found = run(command, part.budget_s * args.budgets, args.out / f"{name}.log")
        report["parts"][name] = found
        lines += [f"| {name} | {' | '.join(cells(part.module, row))} |" for row in found["rows"]]
        (args.out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "bench.md").write_text("\n".join(lines) + "\n")
    console.print("\n".join(lines))
    done = [any("problem" not in row for row in part["rows"]) for part in report["parts"].values()]
    return int(not all(done))


def machine() -> dict[str, Any]:
    """Describe device, driver and versions."""
    on_cuda = torch.cuda.is_available()
    driver = ""
    if on_cuda and (program := shutil.which("nvidia-smi")):
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if on_cuda else cpu_name(),
        "driver": driver,
        "versions": versions(PACKAGES),
    }


def title(report: dict[str, Any]) -> str:
    """Return the line above the table."""
    names = " ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['device']}, driver {report['driver'] or 'none'}, {names}"


def run(command: list[str], budget_s: float, log: Path) -> dict[str, Any]:
    """Run a benchmark within its budget; its standard error goes to `log`."""
    begin_s = time.monotonic()
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # so that its own processes end with it
        )
        problem = ""
        try:
            output, _ = process.communicate(timeout=budget_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            problem = f"stopped after its budget of {budget_s:.0f} s; --budgets multiplies it"
    rows: list[Row] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not problem and process.returncode and not rows:
        last = [line for line in log.read_text().splitlines() if line.strip()] or ["no output"]
        problem = f"exit code {process.returncode}: {last[-1]}"
    if problem:
        rows.append({"problem": problem})
    return {
        "command": f"python {shlex.join(command)}",
        "seconds": round(time.monotonic() - begin_s, 1),
        "rows": rows,
    }


def cells(module: str, row: Row) -> tuple[str, str, str]:
    """Describe a row of a benchmark: measurement, result, comparison."""
    names = {
        "train_step": "attention",
        "peers": "loop",
        "sample": "loop",
        "encode": "setting",
        "draws": "draw",
    }
    name = str(row.get(names[module], ""))
    if "problem" in row:
        return name, "no figures", row["problem"].replace("|", "/")
    if module == "draws":
        return name, f"{row['us']:.0f} us", f"{row['plain_us'] / row['us']:.2f} x the plain version"
    result = f"{row['images_per_s']:,.1f} images/s"
    if module == "train_step":
        return _train_step_cells(row, result)
    if module == "sample":
        return name, result, f"{row['ratio']:.2f} x the usual loop"
    times = [
        f"{value:.2f} x {key.removeprefix('times_')}"
        for key, value in row.items()
        if key.startswith("times_") and not key.endswith("_cpu")
    ]
    if module == "encode":
        times.insert(0, f"{row['share_of_matmul']:.1%} of a matrix product")
    return name, result, ", ".join(times)


def _train_step_cells(row: Row, result: str) -> tuple[str, str, str]:
    setting = f"{row['model']} at {row['image_size']} px, {row['micro_steps']} x {row['micro_batch']} images"
    return (
        f"{setting}, {row['attention']}{', compiled' if row['compiled'] else ''}"
        f"{'' if row['optimizer'] == 'torch' else ', ' + row['optimizer']}",
        f"{result}, {row['share_of_matmul']:.1%} of a matrix product",
        f"update {row['update_s'] * 1e3:.2f} ms, {row['update_share_of_copy']:.0%} of a copy; "
        f"peak {row['peak_memory_bytes'] / 2**30:.1f} GiB, "
        f"predicted {row['predicted_memory_bytes'] / 2**30:.1f} GiB",
    )


if __name__ == "__main__":
    sys.exit(main())
