"""`dit-scale status`: what a run is doing, how often it was interrupted and why, where its time went."""

import argparse
import time
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command
from dit_scale.cli.tables import UNLIMITED_WIDTH, ledger_table, print_table
from dit_scale.cli.watching import add_watching, show_report
from dit_scale.report.words import in_two_units

if TYPE_CHECKING:
    from rich.table import Table

    from dit_scale.report.interruptions import Interruption
    from dit_scale.report.status import Status

MAX_ROWS = 20
"""Interruptions shown; --json prints all of them."""
MAX_TEXT = 160
"""Characters of a reason."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "status",
        _status,
        "show what a run is doing, how often it was interrupted and why, and where its time went",
        description="""\
Report on a run from the files in its folder, while it runs and afterwards.

A run counts as alive if its files have changed recently. If its checkpoints are on S3, supervisors that
are only waiting for nodes write nothing to the folder, so a waiting run can look silent.""",
        example="dit-scale status runs/dit_xl2_256 --watch",
    )
    parser.add_argument("run", help="folder of the run")
    add_watching(parser, "print JSON")


def _status(args: argparse.Namespace) -> int:
    from dit_scale.report.status import status_of

    return show_report(args, lambda: status_of(args.run, time.time()), _show)


def _show(status: "Status") -> None:
    age = f", {in_two_units(status.checkpoint_age_s)} old" if status.checkpoint_age_s is not None else ""
    nodes = ", ".join(status.nodes) or "no supervisor"
    print(
        f"{status.run}: {status.state}, {status.text}",
        f"  step        {_progress(status)}",
        f"  checkpoint  {status.checkpoint or 'none yet'}{age}",
        f"  attempt     {status.attempt}; round {status.round or '-'} ({nodes})",
        *_evaluation_lines(status),
        f"  last write  {in_two_units(status.silence_s)} ago",
        "",
        _interruptions_line(status.interruptions),
        sep="\n",
        flush=True,
    )
    if status.interruptions:
        print_table(_interruptions_table(status.interruptions[-MAX_ROWS:]), UNLIMITED_WIDTH)
    print(f"goodput {status.goodput:.1%} of {in_two_units(status.wall_s)}", flush=True)
    spent_s = {heading: seconds for heading, seconds in status.spent_s.items() if seconds}
    if spent_s:
        print_table(ledger_table(spent_s, status.wall_s), UNLIMITED_WIDTH)


def _progress(status: "Status") -> str:
    if status.steps is not None and status.step > status.steps:
        return f"{status.step}, beyond the {status.steps} steps of the current configuration"
    speed = f"{status.steps_per_s:.3g} steps/s, " if status.steps_per_s else ""
    left = f"{in_two_units(status.eta_s)} left" if status.eta_s is not None else ""
    return f"{status.step} of {status.steps or '?'}  {speed}{left}".rstrip(" ,")


def _evaluation_lines(status: "Status") -> list[str]:
    """Return the line about the last evaluation and the best one, if there is any."""
    from dit_scale.train.evaluation_keys import headline

    if not status.evaluation:
        return []
    values = {name: value for name, value in status.evaluation.items() if name.startswith("eval_")}
    best = f"; best {headline(status.best)} at step {status.best['step']}" if status.best else ""
    return [
        f"  evaluation  step {status.evaluation['step']}: {headline(values) or 'a grid of samples'}{best}"
    ]


def _interruptions_line(found: "list[Interruption]") -> str:
    if not found:
        return "never interrupted"
    last = f"; the last {MAX_ROWS}:" if len(found) > MAX_ROWS else ""
    return f"interruptions: {len(found)}, {sum(one.lost_steps for one in found)} steps lost{last}"


def _interruptions_table(found: "list[Interruption]") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("when (UTC)", "reason", "node"):
        table.add_column(name, no_wrap=True)
    for name in ("rank", "step", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("details", no_wrap=True, overflow="ellipsis")
    for one in found:
        table.add_row(
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(one.at_s)),
            one.reason,
            one.node or "-",
            "-" if one.rank is None else str(one.rank),
            "-" if one.step is None else str(one.step),
            str(one.lost_steps),
            (one.text.splitlines() or [""])[0][:MAX_TEXT],
        )
    return table
