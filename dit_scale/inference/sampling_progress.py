"""Progress of sampling in bulk: a bar on a terminal, a line every 30 s elsewhere."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dit_scale.telemetry.progress import duration

LINE_S = 30.0
"""Seconds between two lines if stderr is no terminal."""
COUNT_S = 10.0
"""Seconds between two counts of what all processes have committed."""


class Tally:
    """How many images all processes have done: those committed, and this process's own denoising steps.

    `count_committed` counts the committed images of all processes. It lists a folder, so it is called rarely.
    """

    def __init__(self, count_committed: Callable[[], int]) -> None:
        self._count_committed = count_committed
        self.before = count_committed()
        self._others = self.before
        self._own = self._own_committed = 0.0
        self._counted_s = time.monotonic()

    def advance(self, images: float) -> None:
        """Count a fraction of this process's images."""
        self._own += images

    def commit(self, images: int) -> None:
        """Count images that this process has committed."""
        self._own_committed += images

    def done(self) -> float:
        """Return the images done so far, at most some seconds out of date."""
        if time.monotonic() - self._counted_s >= COUNT_S:
            self._counted_s = time.monotonic()
            self._others = max(self.before, self._count_committed() - int(self._own_committed))
        return self._others + self._own


class SamplingProgress:
    """Shows images done by all processes, images/s and the remaining time; silent unless `shown`."""

    def __init__(self, num_images: int, count_committed: Callable[[], int], shown: bool) -> None:
        self._console = Console(stderr=True, markup=False, emoji=False)
        self._num_images, self._shown = num_images, shown
        self._tally = Tally(count_committed if shown else lambda: 0)
        self._start_s = self._said_s = time.monotonic()
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=num_images, completed=self._tally.before, status="")

    def __enter__(self) -> "SamplingProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, images: float) -> None:
        """Count a fraction of this process's images, and show it."""
        self._tally.advance(images)
        if self._shown:
            self._show()

    def commit(self, images: int) -> None:
        """Count images that this process has committed."""
        self._tally.commit(images)

    def _show(self) -> None:
        now_s, done = time.monotonic(), min(self._tally.done(), self._num_images)
        speed = (done - self._tally.before) / max(now_s - self._start_s, 1e-9)
        left_s = (self._num_images - done) / speed if speed > 0 else 0.0
        status = f"{speed:.1f} images/s  left {duration(left_s).strip()}"
        self._bar.update(self._task, completed=int(done), status=status)
        if not self._console.is_terminal and now_s - self._said_s >= LINE_S:
            self._said_s = now_s
            line = f"{time.strftime('%H:%M:%S')}  {int(done)}/{self._num_images} images  {status}"
            self._console.print(line, highlight=False, soft_wrap=True)
