"""`dit-scale runs`: the runs below a folder, one line each."""

import argparse
import os
import time
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command
from dit_scale.cli.tables import age, new_screen, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from dit_scale.report.runs import Listing
    from dit_scale.report.status import Status

WATCH_S = 5.0


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "runs",
        _runs,
        "list the runs below a folder: state, step, speed, score, goodput",
        description="""\
List the runs below a folder, the last written first. `dit-scale status RUN` tells more about one of them.
The score is that of the last evaluation during training.""",
        example="dit-scale runs runs --watch",
    )
    parser.add_argument("folder", nargs="?", default="runs", help="where to look (default: runs)")
    parser.add_argument("--json", action="store_true", help="print JSON, for each run as `dit-scale status`")
    parser.add_argument("--watch", action="store_true", help=f"repeat every {WATCH_S:g} s until Ctrl-C")


def _runs(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from dit_scale.errors import ConfigError
    from dit_scale.report.runs import list_runs

    if not os.path.isdir(args.folder):
        raise ConfigError(f"{args.folder} is no folder; pass the folder that contains your runs")
    while True:
        found = list_runs(args.folder, time.time())
        if args.json:
            print(json.dumps(asdict(found), indent=None if args.watch else 2), flush=True)
        else:
            if args.watch:
                new_screen()
            _show(found, args.folder)
        if not args.watch:
            return 0
        time.sleep(WATCH_S)


def _show(found: "Listing", folder: str) -> None:
    if found.runs:
        print_table(_table(found.runs, folder))
    else:
        print(f"no runs in {folder} yet; `dit-scale train` or `dit-scale launch` starts one")
    for path, problem in found.problems.items():
        print(f"{path}: {problem}")


def _table(runs: "list[Status]", folder: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    for name in ("model", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "images/s", "score", "goodput", "last write"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in runs:
        speed = one.log_point.get("images_per_s")
        table.add_row(
            _name(one.run, folder),
            one.model or "-",
            one.state,
            f"{one.step}/{one.steps or '?'}",
            f"{speed:.1f}" if speed else "-",
            _score(one),
            f"{one.goodput:.1%}",
            age(one.silence_s),
        )
    return table


def _score(status: "Status") -> str:
    """Return the number of the last evaluation that decides which one is best, or its first main result."""
    from dit_scale.train.evaluation_keys import is_main

    for name in (*status.best, *status.evaluation):
        if is_main(name) and (value := status.evaluation.get(name)) is not None:
            return f"{name.removeprefix('eval_')} {value:.4g}"
    return "-"


def _name(run: str, folder: str) -> str:
    """Return the name of a run relative to the folder; the folder may be the run itself."""
    name = os.path.relpath(run, folder)
    return os.path.basename(os.path.abspath(run)) if name == os.curdir else name
