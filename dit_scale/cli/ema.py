"""`dit-scale ema ACTION`: list stored averages, and reconstruct averages of other widths."""

import argparse
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command, add_group, int_between, weights_file

if TYPE_CHECKING:
    from dit_scale.inference.stored_averages import StoredAverage

COLUMNS = ("step", "sigma_rel", "profile", "checkpoint", "note")


def add(commands: Any) -> None:
    """Declare the commands."""
    actions = add_group(
        commands,
        "ema",
        "list a run's stored averages, or reconstruct an average of another width",
        example="dit-scale ema reconstruct runs/dit_xl2_256 --sigma-rel 0.08 --out sigma08.safetensors",
    )
    listing = add_command(
        actions,
        "list",
        _list,
        "list a run's stored power-function averages by step",
        example="dit-scale ema list runs/dit_xl2_256",
    )
    listing.add_argument("run", help="run folder")
    listing.add_argument("--json", action="store_true", help="print a JSON list")
    rebuild = add_command(
        actions,
        "reconstruct",
        _reconstruct,
        "reconstruct an average of any width from stored averages",
        description="""Reconstruct an average of any width from stored averages (post-hoc EMA, Karras et al.
2024) and write it to a safetensors file with the published parameter names.

  dit-scale ema reconstruct runs/dit_xl2_256 --sigma-rel 0.08 --out sigma08.safetensors

To store averages, a run needs `ema` profiles with sigma_rel (two work best, for example 0.05 and 0.10)
and checkpoint.ema_every_steps. Averages at 20 steps cover sigma_rel from 0.03 to 0.20.""",
    )
    rebuild.add_argument("run", help="run folder")
    rebuild.add_argument("--sigma-rel", type=_width, required=True, help="relative width, for example 0.08")
    rebuild.add_argument(
        "--step", type=int_between(1), default=None, help="step of the average (default: the newest stored)"
    )
    rebuild.add_argument("--out", type=weights_file, required=True, help=".safetensors file to write")


def _list(args: argparse.Namespace) -> int:
    import json

    from dit_scale.inference.stored_averages import stored_averages
    from dit_scale.train.run_folder import root_of_folder

    stored, problems = stored_averages(root_of_folder(args.run))
    if args.json:
        rows = [*map(_json_row, stored), *({"problem": problem} for problem in problems)]
        print(json.dumps(rows, indent=2))
    else:
        _print_averages(stored)
        for problem in problems:
            print(problem)
    return 0


def _json_row(average: "StoredAverage") -> dict[str, Any]:
    return {
        "step": average.profile.step,
        "sigma_rel": average.profile.sigma_rel,
        "profile": average.name,
        "checkpoint": average.checkpoint.path,
        "since_step": average.since_step,
        "flaw": average.flaw,
    }


def _print_averages(stored: "list[StoredAverage]") -> None:
    from rich import box
    from rich.table import Table

    from dit_scale.cli.tables import print_table

    table = Table(box=box.SIMPLE_HEAD)
    for name in COLUMNS:
        numeric = name in ("step", "sigma_rel")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name != "note")
    for average in stored:
        profile = average.profile
        table.add_row(
            str(profile.step), f"{profile.sigma_rel:g}", average.name, average.checkpoint.path, average.flaw
        )
    print_table(table)


def _reconstruct(args: argparse.Namespace) -> int:
    import sys
    from functools import partial
    from pathlib import Path

    from rich.console import Console
    from rich.progress import track

    from dit_scale.errors import CheckpointError
    from dit_scale.inference.export import export
    from dit_scale.inference.posthoc import PowerProfile
    from dit_scale.inference.stored_averages import reconstruct, stored_averages
    from dit_scale.storage.outputs import check_output
    from dit_scale.train.run_folder import root_of_folder

    check_output(args.out)
    stored, problems = stored_averages(root_of_folder(args.run))
    for problem in problems:
        print(f"skipping {problem}", file=sys.stderr)
    if not stored:
        raise CheckpointError(
            f"{args.run} has no power-function average; set checkpoint.ema_every_steps and an ema profile "
            "with sigma_rel"
        )
    for average in stored:
        if average.flaw:
            print(f"skipping {average.name} at step {average.profile.step}: {average.flaw}", file=sys.stderr)
    usable = [average for average in stored if not average.flaw]
    if not usable:
        raise CheckpointError(
            f"none of the power-function averages of {args.run} is usable yet; train longer and store more"
        )
    target = PowerProfile(args.sigma_rel, args.step or usable[-1].profile.step)
    console = Console(stderr=True)
    show = partial(track, description="parameters", console=console, disable=not console.is_terminal)
    source = reconstruct(usable, target, show)
    export(source, Path(args.out))
    print(f"{source.description} -> {args.out}")
    return 0


def _width(text: str) -> float:
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if not 0 < width < 0.289:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and below 0.289, got {text!r}")
    return width
