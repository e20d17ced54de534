"""`dit-scale replay`: one step of a run once more, sample by sample."""

import argparse
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command, int_between

if TYPE_CHECKING:
    from dit_scale.report.replay import Replay

SHOWN = 20


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "replay",
        _run,
        "take one step of a run again, and show what each sample contributed",
        description="""Take one step of a run again, and show what each of its samples contributed, worst
first. Begins at the newest checkpoint before the step; reads the run and changes nothing in it.

  dit-scale replay runs/dit_xl2_256 --step 123456
  deepspeed -q --num_gpus 8 --no_local_rank --module dit_scale.cli replay runs/dit_xl2_256 --step 123456

At the same number of processes the step is the run's to the bit, at any other to rounding. A step that
failed and was rolled back belongs to an earlier attempt: events.jsonl names it under "rollback".""",
    )
    parser.add_argument("run", help="the run's folder")
    parser.add_argument(
        "--step", type=int_between(1), required=True, help="which, counted from 1 as in metrics.jsonl"
    )
    parser.add_argument(
        "--attempt",
        type=int_between(1),
        default=None,
        help="the run as it was in this attempt (default: as it is now)",
    )
    parser.add_argument("--all", action="store_true", help=f"all samples, not the first {SHOWN}")
    parser.add_argument("--json", action="store_true", help="an object, for machines")


def _run(args: argparse.Namespace) -> int:
    import json
    import sys
    from contextlib import redirect_stdout

    from dit_scale.report.replay import replay

    with redirect_stdout(sys.stderr):  # DeepSpeed has its say there, and not among the JSON
        found = replay(args.run, args.step, args.attempt)
    if found is not None:
        count = len(found.samples) if args.all else SHOWN
        print(json.dumps(tree(found, count), indent=2) if args.json else text(found, count))
    return 0


def tree(found: "Replay", count: int) -> dict[str, Any]:
    """All of it as JSON, `count` samples at most. Numbers that are not finite are strings: nan, inf."""
    from dataclasses import asdict

    from dit_scale.telemetry.meters import COLUMNS

    history = found.history
    recorded = history.recorded and {
        "where": history.recorded.where,
        **dict(zip(COLUMNS, history.recorded.row, strict=True)),
    }
    return _finite(
        {
            "run": found.run,
            "step": found.step,
            "attempt": history.attempt.number,
            "checkpoint": found.checkpoint,
            "world": found.world,
            "world_of_the_run": history.world,
            "rolled_back_in_attempts": history.rolled_back,
            **dict(zip(COLUMNS, found.row, strict=True)),
            "recorded": recorded,
            "differences": found.differences(),
            "num_samples": len(found.samples),
            "samples": [{**asdict(sample), "finite": sample.finite} for sample in found.samples[:count]],
        }
    )


def text(found: "Replay", count: int) -> str:
    """All of it for people, `count` samples at most."""
    from dit_scale.telemetry.meters import COLUMNS

    history = found.history
    *numbers, skipped = zip(COLUMNS, found.row, strict=True)
    row = "  ".join(f"{name} {value:.6g}" for name, value in numbers)
    lines = [
        f"step {found.step} of {found.run}, attempt {history.attempt.number}",
        f"{row}{'  skipped' if skipped[1] else ''}",
        _compared(found),
    ]
    for attempt in history.rolled_back:
        lines.append(
            f"attempt {attempt} failed at this step and was rolled back: --attempt {attempt} shows it"
        )
    lines += ["", "  position     sample  label   used      t         loss          mse           vb"]
    for sample in found.samples[:count]:
        used = "none" if sample.dropped else sample.label
        lines.append(
            f"{sample.position:>10}  {sample.sample_id:>9}  {sample.label:>5}  {used:>5}  {sample.t:>5}  "
            f"{sample.loss:>11.5g}  {sample.mse:>11.5g}  {sample.vb:>11.5g}"
            f"{'' if sample.finite else '  not finite'}"
        )
    if count < len(found.samples):
        lines.append(f"{count} of {len(found.samples)} samples, worst first; --all shows the others")
    return "\n".join(lines)


def _compared(found: "Replay") -> str:
    history, differences = found.history, found.differences()
    world = f"processes: {found.world}, of the run: {'unknown' if history.world is None else history.world}"
    if history.recorded is None:
        return f"{world}; the run wrote down nothing of this step alone"
    if not differences:
        return f"{world}; equal to the bit to what {history.recorded.where} says"
    apart = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return f"{world}; relative difference to what {history.recorded.where} says: {apart}"


def _finite(value: Any) -> Any:
    """The same tree in numbers that JSON knows."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
