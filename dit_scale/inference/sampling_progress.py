"""Progress of sampling in bulk: a bar on a terminal, a line every 30 s elsewhere."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dit_scale.telemetry.progress import duration

LINE_S = 30.0
"""Seconds between two lines if stderr is no terminal."""
COUNT_S = 10.0
"""Seconds between two counts of what other processes have committed."""


class SamplingProgress:
    """Shows images done by all processes, images/s and the remaining time; silent unless `shown`.

    This process counts its own denoising steps as fractions of images. `count_committed` counts the
    committed images of all processes; it lists a folder, so it is called rarely.
    """

    def __init__(self, num_images: int, count_committed: Callable[[], int], shown: bool) -> None:
        self._console = Console(stderr=True, markup=False, emoji=False)
        self._num_images, self._shown = num_images, shown
        self._count_committed = count_committed if shown else lambda: 0
        self._before = self._committed = self._count_committed()
        self._own = self._own_committed = 0.0
        self._start_s = self._counted_s = self._said_s = time.monotonic()
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("sample", total=num_images, completed=self._before, status="")

    def __enter__(self) -> "SamplingProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, images: float) -> None:
        """Count a fraction of this process's images."""
        self._own += images
        if self._shown:
            self._show()

    def committed(self, images: int) -> None:
        """Count images that this process has committed."""
        self._own_committed += images

    def _show(self) -> None:
        now_s = time.monotonic()
        if now_s - self._counted_s >= COUNT_S:
            self._committed, self._counted_s = self._count_committed(), now_s
        # Own commits since the last count may be missing in it; others' never count before they are seen.
        others = max(self._before, self._committed - self._own_committed)
        done = min(others + self._own, self._num_images)
        speed = (done - self._before) / max(now_s - self._start_s, 1e-9)
        left_s = (self._num_images - done) / speed if speed > 0 else 0.0
        status = f"{speed:.1f} images/s  left {duration(left_s).strip()}"
        self._bar.update(self._task, completed=int(done), status=status)
        if not self._console.is_terminal and now_s - self._said_s >= LINE_S:
            self._said_s = now_s
            line = f"{time.strftime('%H:%M:%S')}  {int(done)}/{self._num_images} images  {status}"
            self._console.print(line, highlight=False, soft_wrap=True)
