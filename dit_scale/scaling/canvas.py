"""The door to matplotlib: figures with panels, one style, PNG and SVG files.

Colours are those of Okabe and Ito, which people with any kind of colour blindness can tell apart. Markers
and line styles repeat what colours say.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_scale.storage.outputs import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes

INSTALL = "figures need matplotlib: pip install 'dit-scale[plots]'"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 3.0,
    "svg.hashsalt": "dit-scale",  # the same figure gives the same bytes
}
PANEL_INCHES = (3.8, 3.0)
DPI = 150
KEY_COLUMNS = 3
"""Entries of the key for each column of panels."""
WIDE = 8.0
"""A logarithmic axis that spans less than this factor has evenly spaced ticks."""
SCIENTIFIC = 1e5
"""Numbers from here on are labelled with powers of ten."""


def is_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def style() -> Iterator[None]:
    """Apply the style to all figures that are made and saved within the `with` block."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


class Canvas:
    """A figure under construction: panels in rows and columns."""

    def __init__(self, title: str, columns: int, rows: int = 1) -> None:
        from matplotlib.figure import Figure

        width, height = PANEL_INCHES
        self._figure = Figure((width * columns, height * rows + 0.8), layout="constrained")
        self._panels = self._figure.subplots(rows, columns, squeeze=False)
        self._figure.suptitle(title, fontsize=11)

    def panel(self, row: int, column: int) -> "Axes":
        """Return the axes of one panel."""
        axes: Axes = self._panels[row, column]
        return axes

    def key(self, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Explain styles once for all panels, below them: names and properties of a line."""
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], label=name, **properties) for name, properties in entries]
        columns = min(len(handles), KEY_COLUMNS * self._panels.shape[1])
        self._figure.legend(handles=handles, loc="outside lower center", ncols=columns)

    def hide_empty(self) -> None:
        """Hide the panels without data."""
        for axes in self._panels.flat:
            axes.set_visible(axes.has_data())

    def save(self, stem: Path) -> list[Path]:
        """Write STEM.png and STEM.svg and return their paths."""
        paths = []
        options: dict[str, dict[str, Any]] = {"png": {"dpi": DPI}, "svg": {"metadata": {"Date": None}}}
        for kind, properties in options.items():
            paths.append(stem.with_name(f"{stem.name}.{kind}"))
            with new_file(paths[-1]) as tmp:
                self._figure.savefig(tmp, format=kind, **properties)
        return paths


def log_axis(axes: "Axes", name: str, values: Sequence[float]) -> None:
    """Make the axis "x" or "y" logarithmic, with readable ticks for these values."""
    from matplotlib import ticker

    getattr(axes, f"set_{name}scale")("log")
    axis = getattr(axes, f"{name}axis")
    factor, is_scientific = max(values) / min(values), max(values) >= SCIENTIFIC
    marks = (1.0, 2.0, 5.0) if factor < 200 and not is_scientific else (1.0, 3.0) if factor < 50 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=marks) if factor > WIDE else ticker.MaxNLocator(5))
    axis.set_minor_locator(ticker.NullLocator())
    scientific = ticker.LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf))
    axis.set_major_formatter(scientific if is_scientific else ticker.StrMethodFormatter("{x:g}"))
