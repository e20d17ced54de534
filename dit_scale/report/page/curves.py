"""metrics.jsonl as curves: read in a stream, thinned, and continued as the file grows."""

import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dit_scale.lines import parse_object
from dit_scale.report.page.panels import is_shown
from dit_scale.report.page.thinning import Curve

MAX_POINTS = 1_500
"""Points of one curve; a chart is about as many pixels wide."""
MIN_POINTS = 50
ALL_POINTS = 60_000
"""Points of all curves of a page: about 1 MB."""
CHUNK_LINES = 20_000
MAX_STEP = 2**53
"""Steps beyond this are damage; JavaScript could not count them."""


class Curves:
    """The curves of one record by key. Memory is bounded, whatever the length of the record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self.by_key: dict[str, Curve] = {}

    def update(self) -> None:
        """Read what has been appended, or everything if the file is another one, as after a restart.

        A last line without its newline is left for the next update: it is being written, or torn.
        """
        if not self._path.is_file():
            self._restart(None)
            return
        with self._path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._offset:
                self._restart((stat.st_dev, stat.st_ino))
            file.seek(self._offset)
            while lines := list(islice(file, CHUNK_LINES)):
                if not lines[-1].endswith(b"\n"):
                    del lines[-1]
                if not lines:
                    break
                self._offset += sum(map(len, lines))
                self._add(lines)

    def _restart(self, file: tuple[int, int] | None) -> None:
        self._file, self._offset = file, 0
        self.by_key.clear()

    def _add(self, lines: list[bytes]) -> None:
        columns: dict[str, tuple[list[int], list[float]]] = {}
        for line in lines:
            row = parse_object(line.decode(errors="replace"), "step")
            step = row.pop("step") if row else None
            if row is None or not (type(step) is int and 0 <= step < MAX_STEP):
                continue
            for key, value in row.items():
                if is_shown(key):
                    x, y = columns.setdefault(key, ([], []))
                    x.append(step)
                    y.append(value if type(value) is float else _number(value))
        for key, (x, y) in columns.items():
            values = np.array(y)
            values[~np.isfinite(values)] = np.nan
            self.by_key.setdefault(key, Curve(MAX_POINTS)).extend(np.array(x, np.int64), values)


def _number(value: Any) -> float:
    """Return a number as a float; NaN, a gap, for anything else."""
    return float(value) if type(value) is int and abs(value) < MAX_STEP else np.nan


def points_per_curve(points: int, num_curves: int) -> int:
    """Return how many points each curve may have if all of them may have `points`."""
    return max(MIN_POINTS, min(MAX_POINTS, points // max(1, num_curves)))


def summary(curve: Curve) -> dict[str, Any]:
    """Return the last, the smallest and the largest finite value of a curve, each with its step; or {}."""
    places = np.flatnonzero(~np.isnan(curve.y))
    if not len(places):
        return {}
    y = curve.y[places]
    chosen = {"last": -1, "min": int(np.argmin(y)), "max": int(np.argmax(y))}
    return {name: (float(y[i]), int(curve.x[places[i]])) for name, i in chosen.items()}
