"""`dit-scale ema ACTION`: averages of the weights of other widths than a run tracked."""

import argparse
from typing import Any

from dit_scale.cli.arguments import add_command, add_group, int_between, weights_file


def add(commands: Any) -> None:
    """Declare the commands."""
    actions = add_group(
        commands,
        "ema",
        "list a run's stored averages, or make one of another width",
        example="dit-scale ema reconstruct runs/dit_xl2_256 --sigma-rel 0.08 --out sigma08.safetensors",
    )
    listing = add_command(
        actions,
        "list",
        _list,
        "power-function averages that a run holds, by step",
        example="dit-scale ema list runs/dit_xl2_256",
    )
    listing.add_argument("run", help="the run's folder")
    listing.add_argument("--json", action="store_true", help="a list of objects, for machines")
    rebuild = add_command(
        actions,
        "reconstruct",
        _reconstruct,
        "make an average of any width from the stored ones",
        description="""Make an average of any width from the stored ones (post-hoc EMA, Karras et al. 2024),
and write it as one safetensors file with the published names.

  dit-scale ema reconstruct runs/dit_xl2_256 --sigma-rel 0.08 --out sigma08.safetensors

A run stores averages when it has `ema` profiles with sigma_rel, best two as 0.05 and 0.10, and
checkpoint.ema_every_steps; 20 stored steps serve for sigma_rel from 0.03 to 0.20.""",
    )
    rebuild.add_argument("run", help="the run's folder")
    rebuild.add_argument("--sigma-rel", type=_width, required=True, help="relative width, for example 0.08")
    rebuild.add_argument(
        "--step", type=int_between(1), default=None, help="its step (default: the newest stored)"
    )
    rebuild.add_argument("--out", type=weights_file, required=True, help="the .safetensors file to write")


def _list(args: argparse.Namespace) -> int:
    import json

    from dit_scale.inference.sources import stored_averages
    from dit_scale.train.run_folder import root_of_folder

    stored, problems = stored_averages(root_of_folder(args.run))
    rows = [
        {
            "step": average.profile.step,
            "sigma_rel": average.profile.sigma_rel,
            "profile": average.name,
            "checkpoint": average.checkpoint.path,
            "since_step": average.since_step,
            "flaw": average.flaw,
        }
        for average in stored
    ]
    if args.json:
        print(json.dumps([*rows, *({"problem": problem} for problem in problems)], indent=2))
        return 0
    for row in rows:
        print(
            f"step {row['step']:>9}  sigma_rel {row['sigma_rel']:<6g}  {row['profile']}",
            row["checkpoint"],
            *filter(None, [row["flaw"]]),
            sep="  ",
        )
    for problem in problems:
        print(problem)
    return 0


def _reconstruct(args: argparse.Namespace) -> int:
    import sys
    from functools import partial
    from pathlib import Path

    from rich.console import Console
    from rich.progress import track

    from dit_scale.errors import CheckpointError
    from dit_scale.inference.posthoc import PowerProfile
    from dit_scale.inference.sources import export, reconstruct, stored_averages
    from dit_scale.storage.outputs import check_output
    from dit_scale.train.run_folder import root_of_folder

    check_output(args.out)
    stored, problems = stored_averages(root_of_folder(args.run))
    for problem in problems:
        print(f"passing over {problem}", file=sys.stderr)
    if not stored:
        raise CheckpointError(
            f"{args.run} holds no power-function average; it takes an ema profile with sigma_rel, "
            "and checkpoint.ema_every_steps"
        )
    for one in stored:
        if one.flaw:
            print(f"leaving out {one.name} at step {one.profile.step}: {one.flaw}", file=sys.stderr)
    stored = [one for one in stored if not one.flaw]
    if not stored:
        raise CheckpointError(
            f"none of the power-function averages of {args.run} can be used yet: train on, and store more"
        )
    target = PowerProfile(args.sigma_rel, args.step or stored[-1].profile.step)
    console = Console(stderr=True)
    show = partial(track, description="parameters", console=console, disable=not console.is_terminal)
    source = reconstruct(stored, target, show)
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
