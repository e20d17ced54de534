"""How commands print tables and times: one width rule for terminals, pipes and files."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dit_scale.report.words import in_two_units

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 140
"""Columns of a table that no terminal limits."""
UNLIMITED_WIDTH = 10_000
"""Columns for output whose lines scripts may search: no line is folded."""


def print_table(table: "Table", width: int = PIPE_WIDTH) -> None:
    """Print to standard output: as wide as the terminal, or at most `width` columns elsewhere."""
    _console(width).print(table)


def print_first_that_fits(tables: "Sequence[Table]") -> None:
    """Print the first table whose lines fit into the terminal, or the last one; elsewhere the first."""
    from rich.console import Console

    console, page = _console(UNLIMITED_WIDTH), Console(width=UNLIMITED_WIDTH)
    fitting = (table for table in tables if page.measure(table).maximum <= console.width)
    console.print(next(fitting, tables[-1]))


def _console(width: int) -> "Console":
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


def ledger_table(spent_s: Mapping[str, float], wall_s: float) -> "Table":
    """Return a table of wall-clock time by heading."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("time by heading")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for heading, seconds in spent_s.items():
        table.add_row(heading, f"{seconds:,.1f}", f"{seconds / wall_s:.3%}")
    return table


def age(seconds: float) -> str:
    """Format the largest unit: 3 d, 2 min."""
    return " ".join(in_two_units(seconds).split()[:2])


def new_screen() -> None:
    """Clear the terminal, if standard output is one."""
    from rich.console import Console

    Console().clear()
