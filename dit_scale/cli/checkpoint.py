"""`dit-scale checkpoint ACTION`: what the checkpoints of a run hold."""

import argparse
from typing import Any

from dit_scale.cli.arguments import command


def add(commands: Any) -> None:
    """Declare the commands."""
    parser = commands.add_parser("checkpoint", help="list or export the checkpoints of a run")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    listing = command(actions, "list", _list, "committed checkpoints of a run, newest first")
    listing.add_argument("run", help="the run's folder")
    listing.add_argument("--json", action="store_true", help="a list of objects, for machines")
    export = command(
        actions,
        "export",
        _export,
        "write EMA weights as one safetensors file with the published names",
    )
    export.add_argument("source", help="run folder (its newest checkpoint) or checkpoint folder")
    export.add_argument("out", help="the .safetensors file to write")
    export.add_argument("--ema", default=None, help="EMA profile (default: the first of the run)")


def _list(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from dit_scale.errors import CheckpointError, ConfigError
    from dit_scale.storage import open_storage
    from dit_scale.train.checkpoint import Checkpoint, committed
    from dit_scale.train.run import checkpoints_of

    if not (Path(args.run) / "config.yaml").is_file():
        raise ConfigError(f"{args.run}: expected a run's folder, with its config.yaml")
    storage = open_storage(checkpoints_of(args.run))
    rows: list[dict[str, Any]] = []
    for name in committed(storage):
        try:
            found = Checkpoint(storage, name)
            rows.append({"name": name, "step": found.manifest.step, "bytes": found.bytes})
        except CheckpointError as error:
            rows.append({"name": name, "problem": str(error)})
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(
            row["name"],
            row.get("problem") or f"step {row['step']:>9}  {row['bytes'] / 1e6:10.1f} MB",
            sep="  ",
        )
    return 0


def _export(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dit_scale.sources import export, open_source

    source = open_source(args.source, args.ema)
    export(source, Path(args.out))
    print(f"{source.description} -> {args.out}")
    return 0
