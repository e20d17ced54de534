"""`dit-scale replay`: take one step of a run again, and show each of its samples."""

import argparse
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command, int_between
from dit_scale.cli.tables import UNLIMITED_WIDTH, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from dit_scale.report.replay import Replay

MAX_SAMPLES = 20
"""Samples shown without --all."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "replay",
        _run,
        "take one step of a run again, and show what each sample contributed",
        description="""\
Take one step of a run again, and show what each of its samples contributed, worst first. Training
starts from the newest checkpoint before the step. The run is not modified.

  dit-scale replay runs/dit_xl2_256 --step 123456
  deepspeed -q --num_gpus 8 --no_local_rank --module dit_scale.cli replay runs/dit_xl2_256 --step 123456

With the world size of the run, the step is bit-identical; with any other, it is equal up to rounding.
A step that failed and was rolled back belongs to an earlier attempt: look for "rollback" in
events.jsonl.""",
    )
    parser.add_argument("run", help="folder of the run")
    parser.add_argument(
        "--step", type=int_between(1), required=True, help="number of the step, from 1 as in metrics.jsonl"
    )
    parser.add_argument(
        "--attempt",
        type=int_between(1),
        default=None,
        help="replay the run as it was in this attempt (default: as it is now)",
    )
    parser.add_argument("--all", action="store_true", help=f"show all samples, not only {MAX_SAMPLES}")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    import json
    import sys
    from contextlib import redirect_stdout

    from dit_scale.report.replay import replay

    with redirect_stdout(sys.stderr):  # DeepSpeed prints to stdout, which may be parsed as JSON
        result = replay(args.run, args.step, args.attempt)
    if result is None:
        return 0
    count = len(result.samples) if args.all else MAX_SAMPLES
    if args.json:
        print(json.dumps(tree(result, count), indent=2))
    else:
        show(result, count)
    return 0


def tree(result: "Replay", count: int) -> dict[str, Any]:
    """Return the result for JSON, with at most `count` samples. Numbers that are not finite are strings."""
    from dataclasses import asdict

    from dit_scale.telemetry.meters import COLUMNS

    history = result.history
    recorded = history.recorded and {
        "where": history.recorded.where,
        **dict(zip(COLUMNS, history.recorded.row, strict=True)),
    }
    return _finite(
        {
            "run": result.run,
            "step": result.step,
            "attempt": history.attempt.number,
            "checkpoint": result.checkpoint,
            "world": result.world,
            "world_of_the_run": history.world,
            "rolled_back_in_attempts": history.rolled_back,
            **dict(zip(COLUMNS, result.row, strict=True)),
            "recorded": recorded,
            "differences": result.differences(),
            "num_samples": len(result.samples),
            "samples": [{**asdict(sample), "finite": sample.finite} for sample in result.samples[:count]],
        }
    )


def show(result: "Replay", count: int) -> None:
    """Print the result with at most `count` samples."""
    from dit_scale.telemetry.meters import COLUMNS

    history = result.history
    *values, skipped = zip(COLUMNS, result.row, strict=True)
    row = "  ".join(f"{name} {value:.6g}" for name, value in values)
    print(f"step {result.step} of {result.run}, attempt {history.attempt.number}")
    print(f"{row}{'  skipped' if skipped[1] else ''}")
    print(_comparison(result))
    for attempt in history.rolled_back:
        print(f"attempt {attempt} failed at this step and was rolled back; see it with --attempt {attempt}")
    print_table(_samples_table(result, count), UNLIMITED_WIDTH)
    if count < len(result.samples):
        print(f"{count} of {len(result.samples)} samples, worst first; --all shows all of them")


def _samples_table(result: "Replay", count: int) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("position", "sample", "label", "used", "t", "loss", "mse", "vb"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for sample in result.samples[:count]:
        table.add_row(
            str(sample.position),
            str(sample.sample_id),
            str(sample.label),
            "none" if sample.dropped else str(sample.label),
            str(sample.t),
            *(f"{value:.5g}" for value in (sample.loss, sample.mse, sample.vb)),
            "" if sample.finite else "not finite",
        )
    return table


def _comparison(result: "Replay") -> str:
    history, differences = result.history, result.differences()
    run_world = "unknown" if history.world is None else history.world
    world = f"world size {result.world}, in the run {run_world}"
    if history.recorded is None:
        return f"{world}; the run recorded nothing for this step alone"
    if not differences:
        return f"{world}; bit-identical to {history.recorded.where}"
    listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return f"{world}; relative differences to {history.recorded.where}: {listed}"


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot represent by strings."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
