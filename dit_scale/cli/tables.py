"""How commands print tables: one width rule for terminals, pipes and files."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

PIPE_WIDTH = 140
"""Columns of a table that no terminal limits."""


def print_table(table: "Table", width: int = PIPE_WIDTH) -> None:
    """Print to standard output: as wide as the terminal, or at most `width` columns elsewhere."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = width
    console.print(table)
