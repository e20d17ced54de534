"""`dit-scale config`: print every configuration key with its type, default and meaning."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command
from dit_scale.cli.tables import print_table

if TYPE_CHECKING:
    from rich.table import Table

    from dit_scale.keys import KeyGroup


OTHER_ROOTS = ("encode", "scaling")
"""First arguments that select the keys of an encoding job or a study instead of those of a training run."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "config",
        _run,
        "explain every configuration key, with its type and default",
        description="""\
Print configuration keys with their types, defaults and meanings: those of a training run, those of
the encoding job after the word `encode`, or those of a study after the word `scaling`.

  dit-scale config
  dit-scale config optimizer engine.precision
  dit-scale config encode vae_batch""",
    )
    parser.add_argument("keys", nargs="*", metavar="KEY", help="keys or sections (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from dit_scale.config import EncodeConfig, Section, TrainConfig
    from dit_scale.keys import groups
    from dit_scale.scaling.config import StudyConfig

    roots: dict[str, type[Section]] = dict(zip(OTHER_ROOTS, (EncodeConfig, StudyConfig), strict=True))
    word, *keys = args.keys or [""]
    found = groups(roots[word], keys) if word in roots else groups(TrainConfig, args.keys)
    if args.json:
        print(json.dumps([asdict(key) for group in found for key in group.keys], indent=2))
    else:
        print_table(_table(found))
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
