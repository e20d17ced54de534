"""Progress of a run: a bar and a status line on a terminal, one line per log point elsewhere."""

import time
from collections import deque
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from dit_scale.image_progress import duration, show_cursor

RECENT = 10
"""Number of log points from which the remaining time is estimated."""
BAR_WIDTH = 12
IMPORTANCE = ("loss", "left", "img/s", "grad", "mfu", "lr", "time")
"""Parts of the status, the most important first; a narrow terminal shows only the first ones."""


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
            BarColumn(bar_width=BAR_WIDTH),
            _StatusColumn(self._console, len(f"step {total_steps}/{total_steps} ") + BAR_WIDTH + 1),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=first_step, status={})
        self._bar.start()
        show_cursor(self._console)

    def advance(self) -> None:
        """Advance the bar by one step."""
        self._bar.advance(self._task)

    def report(self, step: int, record: dict[str, float | None]) -> None:
        """Show the numbers of a log point, the time of day and the remaining time; None is shown as nan."""
        shown = {name: float("nan") if value is None else value for name, value in record.items()}
        parts = {
            "time": time.strftime("%H:%M:%S"),
            "loss": f"loss {shown['loss']:6.4f}",
            "grad": f"grad {shown['grad_norm']:7.3f}",
            "lr": f"lr {shown['lr']:.1e}",
            "img/s": f"{shown['images_per_s']:8.1f} img/s",
        }
        if record.get("mfu") is not None:
            parts["mfu"] = f"MFU {shown['mfu']:5.1%}"
        parts["left"] = f"left {duration(self._left_s(step))}"
        self._bar.update(self._task, status=parts)
        if self._shown and not self._console.is_terminal:
            width = len(str(self._total_steps))
            now, *numbers = parts.values()
            self._print("  ".join([now, f"step {step:>{width}}/{self._total_steps}", *numbers]))

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


class _StatusColumn(ProgressColumn):
    """The parts of the status that fit into the line, whatever the width of the terminal is now."""

    def __init__(self, console: Console, used: int) -> None:
        """`used` characters of the line belong to other columns."""
        super().__init__()
        self._console, self._used = console, used

    def render(self, task: Task) -> Text:
        return Text(fit(task.fields["status"], self._console.width - self._used), no_wrap=True)


def fit(parts: dict[str, str], width: int) -> str:
    """Return the most important parts that fit into a width, in their own order."""
    kept: list[str] = []
    for name in IMPORTANCE:
        if name in parts and len(_joined(parts, [*kept, name])) > width:
            break
        kept.append(name)
    return _joined(parts, kept)


def _joined(parts: dict[str, str], names: Sequence[str]) -> str:
    return "  ".join(" ".join(text.split()) for name, text in parts.items() if name in names)
