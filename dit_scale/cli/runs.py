"""`dit-scale runs`: the runs below a folder, one line each."""

import argparse
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command
from dit_scale.cli.tables import age, print_first_that_fits
from dit_scale.cli.watching import add_watching, show_report

if TYPE_CHECKING:
    from rich.table import Table

    from dit_scale.report.runs import Listing
    from dit_scale.report.status import Status

LEAST = ("model", "goodput", "img/s", "score")
"""Columns that a narrow terminal does not show, the least important first."""


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
    add_watching(parser, "print JSON, for each run as `dit-scale status`")


def _runs(args: argparse.Namespace) -> int:
    from dit_scale.errors import ConfigError
    from dit_scale.report.runs import list_runs

    if not os.path.isdir(args.folder):
        raise ConfigError(f"{args.folder} is not a folder; pass the folder that contains your runs")
    return show_report(
        args, lambda: list_runs(args.folder, time.time()), lambda found: _show(found, args.folder)
    )


def _show(found: "Listing", folder: str) -> None:
    if found.runs:
        rows = _rows(found.runs, folder)
        print_first_that_fits([_table(rows, LEAST[:count]) for count in range(len(LEAST) + 1)])
    else:
        print(f"no runs in {folder} yet; `dit-scale train` or `dit-scale launch` starts one")
    for path, problem in found.problems.items():
        print(f"{path}: {problem}")


def _rows(runs: "list[Status]", folder: str) -> list[dict[str, str]]:
    """Return the cells of each run by column, in the order of the columns."""
    return [
        {
            "run": _name(one.run, folder),
            "model": one.model or "-",
            "state": one.state,
            "step": f"{one.step}/{one.steps or '?'}",
            "img/s": f"{one.log_point['images_per_s']:.1f}" if one.log_point.get("images_per_s") else "-",
            "score": _score(one),
            "goodput": f"{one.goodput:.1%}",
            "written": age(one.silence_s),
        }
        for one in runs
    ]


def _table(rows: list[dict[str, str]], hidden: Sequence[str] = ()) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    names = [name for name in rows[0] if name not in hidden]
    for name in names:
        is_text = name in ("run", "model", "state")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in names))
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
