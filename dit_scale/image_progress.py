"""Progress in images: a bar on a terminal, a line every 30 s elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINE_S = 30.0
"""Seconds between two lines if stderr is no terminal."""


class ImageProgress:
    """Shows how many images are done, images/s and the remaining time; silent unless `shown`."""

    def __init__(self, num_images: int, *, done: float = 0.0, title: str = "", shown: bool = True) -> None:
        """`done` images need no work; they do not count for the speed."""
        # Folders may be called [red] or :x:, and titles contain them: show text literally.
        self._console = Console(stderr=True, markup=False, emoji=False)
        self._num_images, self._before = num_images, done
        self._title = f"{title}: " if title else ""
        self._has_bar, self._has_lines = shown and self._console.is_terminal, shown
        self._start_s = self._said_s = time.monotonic()
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            console=self._console,
            disable=not self._has_bar,
        )
        self._task = self._bar.add_task("", total=num_images, completed=int(done), status="")

    def __enter__(self) -> "ImageProgress":
        if self._title and self._has_bar:
            self._console.print(self._title.rstrip(), highlight=False, soft_wrap=True)
        self._bar.start()
        show_cursor(self._console)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, done: float) -> None:
        """Show the number of images done; it may have a fraction."""
        now_s, done = time.monotonic(), min(done, self._num_images)
        speed = (done - self._before) / max(now_s - self._start_s, 1e-9)
        left_s = (self._num_images - done) / speed if speed > 0 else 0.0
        status = f"{speed:.1f} images/s  left {duration(left_s).strip()}"
        self._bar.update(self._task, completed=_whole(done), status=status)
        if self._has_lines and not self._has_bar and now_s - self._said_s >= LINE_S:
            self._said_s = now_s
            clock = time.strftime("%H:%M:%S")
            line = f"{clock}  {self._title}{_whole(done)}/{self._num_images} images  {status}"
            self._console.print(line, highlight=False, soft_wrap=True)


def _whole(done: float) -> int:
    """Round down; a sum of fractions may fall short of a whole number by a rounding error."""
    return int(done + 1e-6)


def duration(seconds: float) -> str:
    """Format hours, minutes and seconds, 10 characters wide: `  26:03:09`."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:>4}:{minute:02}:{second:02}"


def show_cursor(console: Console) -> None:
    """Show the cursor, which a bar hides: a process that is killed could not show it again."""
    if console.is_terminal:
        console.show_cursor(True)
