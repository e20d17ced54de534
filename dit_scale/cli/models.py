"""`dit-scale models`: the table of all models."""

import argparse
from typing import Any

from dit_scale.cli.arguments import command


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(
        commands,
        "models",
        _run,
        "table of all models: parameters and forward GMACs",
        example="dit-scale models DiT-XL/2 DiT-B/4",
    )
    parser.add_argument("names", nargs="*", help="rows to show, for example DiT-XL/2 (default: all)")
    parser.add_argument("--json", action="store_true", help="a list of objects, for machines")


def _run(args: argparse.Namespace) -> int:
    from dit_scale.models.table import print_table

    print_table(args.json, args.names or None)
    return 0
