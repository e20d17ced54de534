"""`dit-scale checkpoint ACTION`: list, verify, export, keep and prune checkpoints."""

import argparse
from typing import Any

from dit_scale.cli.arguments import add_command, add_group, int_between, weights_file


def add(commands: Any) -> None:
    """Declare the commands."""
    actions = add_group(
        commands,
        "checkpoint",
        "list, verify, export, keep or prune a run's checkpoints",
        example="dit-scale checkpoint list runs/dit_xl2_256",
    )
    listing = add_command(
        actions,
        "list",
        _list,
        "committed checkpoints of a run, newest first",
        example="dit-scale checkpoint list runs/dit_xl2_256",
    )
    listing.add_argument("run", help="the run folder")
    listing.add_argument("--json", action="store_true", help="print a JSON list of objects")
    verify = add_command(
        actions,
        "verify",
        _verify,
        "read every byte and report damage; exits with 1 if there is any",
        example="dit-scale checkpoint verify runs/dit_xl2_256",
    )
    verify.add_argument(
        "source",
        help="run folder (verifies all checkpoints, stored averages and attempts) or checkpoint folder",
    )
    export = add_command(
        actions,
        "export",
        _export,
        "short for `dit-scale export --to safetensors`",
        example="dit-scale checkpoint export runs/dit_xl2_256 dit_xl2_256.safetensors",
    )
    export.add_argument("source", help="run folder (exports its newest checkpoint) or checkpoint folder")
    export.add_argument("out", type=weights_file, help="the .safetensors file to write")
    export.add_argument("--ema", default=None, help="EMA profile (default: the first one of the run)")
    _add_retention(actions)


def _add_retention(actions: Any) -> None:
    keep = add_command(
        actions,
        "keep",
        _keep,
        "keep one checkpoint permanently, regardless of retention",
        example="dit-scale checkpoint keep runs/dit_xl2_256 0000400000-0003",
    )
    keep.add_argument("run", help="the run folder")
    keep.add_argument(
        "checkpoint", metavar="NAME", help="name as printed by `checkpoint list`, for example 0000400000-0003"
    )
    prune = add_command(
        actions,
        "prune",
        _prune,
        "delete checkpoints that retention does not keep; a dry run without --yes",
        description="""Delete checkpoints that retention does not keep. The run must not be running.
Without --yes, only prints what would be deleted. With --yes, verifies the newest checkpoint first.""",
        example="dit-scale checkpoint prune runs/dit_xl2_256 --keep 2 --yes",
    )
    prune.add_argument("run", help="the run folder")
    prune.add_argument(
        "--keep",
        type=int_between(1),
        default=None,
        help="number of newest checkpoints to keep (default: as configured)",
    )
    prune.add_argument("--yes", action="store_true", help="delete the checkpoints")


def _list(args: argparse.Namespace) -> int:
    import json

    from dit_scale.checkpoint.attempts import committed
    from dit_scale.checkpoint.reader import Checkpoint
    from dit_scale.errors import CheckpointError
    from dit_scale.train.run_folder import root_of_folder

    root = root_of_folder(args.run)
    rows: list[dict[str, Any]] = []
    for checkpoint_id in committed(root):
        name = checkpoint_id.name
        try:
            found = Checkpoint(root, checkpoint_id)
            rows.append({"name": name, "step": found.manifest.step, "bytes": found.bytes})
        except CheckpointError as error:
            rows.append({"name": name, "problem": str(error)})
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    _print(rows)
    return 0


def _print(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    from dit_scale.cli.tables import UNLIMITED_WIDTH, print_table

    if not rows:
        print("no committed checkpoint")
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("checkpoint", no_wrap=True)
    for name in ("step", "MB"):
        table.add_column(name, justify="right")
    if any("problem" in row for row in rows):
        table.add_column("problem")
    for row in rows:
        if "problem" in row:
            table.add_row(row["name"], "", "", row["problem"])
        else:
            table.add_row(row["name"], str(row["step"]), f"{row['bytes'] / 1e6:,.1f}")
    print_table(table, UNLIMITED_WIDTH)


def _verify(args: argparse.Namespace) -> int:
    from functools import partial
    from pathlib import Path

    from dit_scale.checkpoint import attempts
    from dit_scale.checkpoint.manifest import EMA
    from dit_scale.checkpoint.reader import Checkpoint
    from dit_scale.errors import CheckpointError
    from dit_scale.inference.sources import checkpoints_at
    from dit_scale.train.run_folder import root_of_folder

    damaged = False
    to_verify = checkpoints_at(args.source)
    if (Path(args.source) / "config.yaml").is_file():
        root = root_of_folder(args.source)
        averages = attempts.committed(root, EMA)
        to_verify += [(average.path(EMA), partial(Checkpoint, root, average, EMA)) for average in averages]
        for problem in attempts.problems(root):
            damaged = True
            print(problem)
        _print_edits(args.source)
    for path, opened in to_verify:
        try:
            checkpoint = opened()
            checkpoint.verify()
            print(
                f"{path}: intact, {checkpoint.bytes / 1e6:.1f} MB in {len(checkpoint.manifest.files)} files"
            )
        except CheckpointError as error:
            damaged = True
            print(f"{path}: {error}")
    return int(damaged)


def _print_edits(run: str) -> None:
    """Print how config.yaml, which has no digest, differs from the configuration in the newest manifest."""
    from contextlib import suppress

    from dit_scale.checkpoint.attempts import committed
    from dit_scale.checkpoint.reader import Checkpoint
    from dit_scale.errors import CheckpointError
    from dit_scale.train.changes import differences
    from dit_scale.train.run_folder import config_of_folder, root_of_folder

    config, root = config_of_folder(run), root_of_folder(run)
    for checkpoint_id in committed(root):
        with suppress(CheckpointError):
            saved = Checkpoint(root, checkpoint_id).config
            for line in differences(saved.model_copy(update={"run": config.run}), config):
                print(f"note: config.yaml differs from {checkpoint_id.path()}: {line}")
            return


def _export(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dit_scale.inference.export import export
    from dit_scale.inference.sources import open_source
    from dit_scale.storage.outputs import check_output

    check_output(args.out)
    source = open_source(args.source, args.ema)
    export(source, Path(args.out))
    print(f"{source.description} -> {args.out}")
    return 0


def _keep(args: argparse.Namespace) -> int:
    from dit_scale.checkpoint.attempts import committed
    from dit_scale.checkpoint.manifest import CheckpointId
    from dit_scale.checkpoint.retention import TAG
    from dit_scale.errors import CheckpointError
    from dit_scale.train.run_folder import root_of_folder

    root = root_of_folder(args.run)
    checkpoint_id = CheckpointId.parse(args.checkpoint)
    if checkpoint_id is None or checkpoint_id not in committed(root):
        raise CheckpointError(
            f"{args.run} has no checkpoint {args.checkpoint}; `dit-scale checkpoint list` prints their names"
        )
    root.write(f"{checkpoint_id.path()}/{TAG}", b"")
    print(f"{checkpoint_id.path()} is kept permanently")
    return 0


def _prune(args: argparse.Namespace) -> int:
    from dit_scale.checkpoint import attempts, retention
    from dit_scale.checkpoint.reader import Checkpoint
    from dit_scale.errors import CheckpointError
    from dit_scale.train.run_folder import config_of_folder, root_of_folder

    config, root = config_of_folder(args.run).checkpoint, root_of_folder(args.run)
    ids, numbers = attempts.committed(root), attempts.numbers(root)
    if not ids:
        raise CheckpointError(f"{args.run} has no committed checkpoint")
    _print_edits(args.run)
    keep = args.keep or config.keep
    rule = retention.Rule(keep, config.keep_every_steps, config.keep_best)
    if args.yes:
        Checkpoint(root, ids[0]).verify()
        paths = retention.prune(root, numbers[-1] if numbers else 0, ids[0], rule)
    else:
        paths = retention.superfluous(root, ids[0], rule)
    for path in paths:
        print(f"{path}: {'deleted' if args.yes else 'would be deleted'}")
    return 0
