"""Progress of a run: a bar and a status line on a terminal, one line per log point elsewhere."""

import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from dit_scale.image_progress import duration

RECENT = 10
"""Number of log points from which the remaining time is estimated."""


class StatusLine:
    """Shows the progress of a run; silent on all ranks except the first."""

    def __init__(self, total_steps: int, first_step: int, shown: bool) -> None:
        # Folders may be called [red] or :x:, and messages contain brackets: show text literally.
        self._console = Console(stderr=True, markup=False, emoji=False)
        self._shown, self._total_steps = shown, total_steps
        self._recent = deque([(first_step, time.monotonic())], maxlen=RECENT)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[status]}", table_column=Column()),  # wraps on a narrow terminal
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=first_step, status="")
        self._bar.start()

    def advance(self) -> None:
        """Advance the bar by one step."""
        self._bar.advance(self._task)

    def report(self, step: int, record: dict[str, float | None]) -> None:
        """Show the numbers of a log point, the time of day and the remaining time; None is shown as nan."""
        shown = {name: float("nan") if value is None else value for name, value in record.items()}
        status = (
            f"loss {shown['loss']:6.4f}  grad {shown['grad_norm']:7.3f}  lr {shown['lr']:.1e}"
            f"  {shown['images_per_s']:8.1f} img/s  left {duration(self._left_s(step))}"
        )
        now = time.strftime("%H:%M:%S")
        self._bar.update(self._task, status=f"{now}  {status}")
        if self._shown and not self._console.is_terminal:
            width = len(str(self._total_steps))
            self._print(f"{now}  step {step:>{width}}/{self._total_steps}  {status}")

    def say(self, message: str) -> None:
        """Show a line above the bar."""
        if self._shown:
            self._print(message)

    def close(self) -> None:
        self._bar.stop()

    def _print(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, soft_wrap=True)

    def _left_s(self, step: int) -> float:
        """Return the remaining time at the speed of recent steps."""
        now_s = time.monotonic()
        before, then_s = self._recent[0]
        self._recent.append((step, now_s))
        return (self._total_steps - step) * (now_s - then_s) / max(1, step - before)
