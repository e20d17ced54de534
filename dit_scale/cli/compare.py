"""`dit-scale compare`: runs side by side, their configurations and their metrics."""

import argparse
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command
from dit_scale.cli.tables import print_table
from dit_scale.report.words import in_two_units

if TYPE_CHECKING:
    from rich.table import Table

    from dit_scale.report.comparison import Comparison

MAX_POINTS = 5
"""Common steps shown per metric; --json prints all of them."""
LABELS = {"images_per_s": "images_per_s (median)", "wall_s": "wall-clock time"}


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "compare",
        _run,
        "show what differs between runs: configuration, loss, scores, speed, time",
        description="""\
Show what differs between runs: the keys of their configurations, their metrics at the steps that all of
them recorded, and how they ended. Percentages compare with the first run.""",
        example="dit-scale compare runs/a runs/b",
    )
    parser.add_argument("run", help="folder of a run, with which the others are compared")
    parser.add_argument("others", nargs="+", metavar="RUN", help="folders of the other runs")
    parser.add_argument("--json", action="store_true", help="print JSON, with all common steps")


def _run(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from dit_scale.report.comparison import compare

    found = compare([args.run, *args.others], time.time())
    if args.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _show(found)
    return 0


def _show(found: "Comparison") -> None:
    names = short_names(found.runs)
    if found.configuration:
        table = _table(["configuration", *names])
        for key, values in found.configuration.items():
            table.add_row(key, *map(_text, values))
        print_table(table)
    else:
        print("the configurations are equal")
    shown = {metric: points for metric, points in found.common.items() if _is_shown(metric)}
    if shown:
        table = _table(["metric", found.clock, *names])
        for metric, points in shown.items():
            table.add_section()
            for number, at in enumerate(evenly_spaced(list(points), MAX_POINTS)):
                table.add_row("" if number else metric, str(at), *_with_changes(points[at]))
        print_table(table)
    else:
        print("the runs have no log point in common")
    table = _table(["at the end", *names])
    for measure, values in found.end.items():
        if _is_shown(measure):
            table.add_row(LABELS.get(measure, measure), *_ends(measure, values))
    print_table(table)


def _is_shown(metric: str) -> bool:
    """Whether a metric has a place on a screen: of evaluations only the main results."""
    from dit_scale.train.evaluation_keys import is_main

    return is_main(metric) or not metric.startswith("eval_")


def short_names(runs: Sequence[str]) -> list[str]:
    """Return the folders relative to the deepest folder that contains all of them."""
    folders = [os.path.abspath(run) for run in runs]
    parent = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    return [os.path.relpath(folder, parent) for folder in folders]


def evenly_spaced(items: Sequence[int], most: int) -> list[int]:
    """Return at most `most` items, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def _table(columns: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(columns[0])
    for name in columns[1:]:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _ends(key: str, values: Sequence[Any]) -> list[str]:
    match key:
        case "wall_s":
            return [in_two_units(value) for value in values]
        case "goodput":
            return [f"{value:.1%}" for value in values]
        case "state" | "step" | "samples":
            return [_text(value) for value in values]
    return _with_changes(values)


def _with_changes(values: Sequence[float | None]) -> list[str]:
    """Format numbers; all but the first with their change relative to it."""
    first = values[0]
    changes = [f" ({value / first - 1:+.1%})" if first and value is not None else "" for value in values]
    return [_number(value) + change for value, change in zip(values, ["", *changes[1:]], strict=True)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _text(value: Any) -> str:
    import json

    if value is None:
        return "-"
    return value if isinstance(value, str) and value else json.dumps(value)
