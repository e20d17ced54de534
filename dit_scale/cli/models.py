"""`dit-scale models`: print the table of all models."""

import argparse
from typing import Any

from dit_scale.cli.arguments import add_command


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "models",
        _run,
        "print parameters and forward GMACs of every model",
        example="dit-scale models DiT-XL/2 DiT-B/4",
    )
    parser.add_argument("names", nargs="*", help="models to print, for example DiT-XL/2 (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    from dit_scale.models.table import print_table

    print_table(args.json, args.names or None)
    return 0
