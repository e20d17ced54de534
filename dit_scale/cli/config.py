"""`dit-scale config`: every key of a configuration, what it means, its type and its default."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command

if TYPE_CHECKING:
    from rich.table import Table

    from dit_scale.keys import KeyGroup


ENCODE = "encode"
"""As the first word: the keys of the encoding job instead of those of a training run."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "config",
        _run,
        "what every key of a configuration means, its type and its default",
        description="""Print keys with their types, defaults and what they mean: those of a training run, or
behind the word `encode` those of the encoding job.

  dit-scale config
  dit-scale config optimizer engine.precision
  dit-scale config encode vae_batch""",
    )
    parser.add_argument("keys", nargs="*", metavar="KEY", help="keys or sections (default: all)")
    parser.add_argument("--json", action="store_true", help="a list of objects, for machines")


def _run(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from dit_scale.config import EncodeConfig, TrainConfig
    from dit_scale.keys import groups

    of_encoding = args.keys[:1] == [ENCODE]
    found = groups(EncodeConfig, args.keys[1:]) if of_encoding else groups(TrainConfig, args.keys)
    if args.json:
        print(json.dumps([asdict(key) for group in found for key in group.keys], indent=2))
    else:
        _print(_table(found))
    return 0


def _table(found: "Sequence[KeyGroup]") -> "Table":
    import json

    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("key", no_wrap=True)
    table.add_column("type", max_width=30)
    table.add_column("default", max_width=26, overflow="fold")
    table.add_column("", overflow="fold")
    for group in found:
        table.add_section()
        table.add_row(Text(group.name, "bold"), "", "", Text(group.doc, "bold"))
        for key in group.keys:
            default = "(required)" if key.required else json.dumps(key.default).strip('"')
            table.add_row(*map(Text, (key.key, key.type, default, key.doc)))
    return table


def _print(table: "Table") -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 140  # nobody's window is too narrow for it
    console.print(table)
