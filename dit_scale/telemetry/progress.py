"""One status line with a progress bar on a terminal; one line per log point elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StatusLine:
    """Shows the steps of a run; silent on all ranks but the first."""

    def __init__(self, total_steps: int, first_step: int, shown: bool) -> None:
        self._console = Console(stderr=True)
        self._shown, self._total_steps = shown, total_steps
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=first_step, status="")
        self._bar.start()

    def advance(self) -> None:
        self._bar.advance(self._task)

    def report(self, step: int, record: dict[str, float | None]) -> None:
        """Show the numbers of a log point; a number that is None has no value there."""
        shown = {name: float("nan") if value is None else value for name, value in record.items()}
        status = (
            f"loss {shown['loss']:.4f}  grad {shown['grad_norm']:.3f}  "
            f"lr {shown['lr']:.1e}  {shown['images_per_s']:8.1f} img/s"
        )
        self._bar.update(self._task, status=status)
        if self._shown and not self._console.is_terminal:
            self._console.print(f"step {step:>7}/{self._total_steps}  {status}", highlight=False)

    def say(self, message: str) -> None:
        """One line above the bar."""
        if self._shown:
            self._bar.console.print(message, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
