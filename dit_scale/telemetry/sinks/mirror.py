"""What a mirror of the record is, and how one may fail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from dit_scale.lines import Alarm


class Sink(Protocol):
    """Receives named numbers and pictures; None stands for a mean over nothing."""

    def write(self, step: int, record: dict[str, float | None]) -> None:
        """Add a row of the record; steps ascend."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Add the picture in a file."""

    def scores(self, step: int, figures: dict[str, float | None]) -> None:
        """Show figures of the weights of a step that may be long past."""

    def close(self) -> None:
        """Write what is left."""


class Mirror:
    """A sink that may fail at any time: that costs one alarm, and the run continues without it."""

    def __init__(self, name: str, make: Callable[[], Sink], alarm: Alarm) -> None:
        self._name, self._alarm = name, alarm
        self._sink: Sink | None = None
        with self._guarded("failed to start"):
            self._sink = make()

    def write(self, step: int, record: dict[str, float | None]) -> None:
        if self._sink is not None:
            with self._guarded("failed"):
                self._sink.write(step, record)

    def picture(self, step: int, name: str, path: Path) -> None:
        if self._sink is not None:
            with self._guarded("failed"):
                self._sink.picture(step, name, path)

    def scores(self, step: int, figures: dict[str, float | None]) -> None:
        if self._sink is not None:
            with self._guarded("failed"):
                self._sink.scores(step, figures)

    def close(self) -> None:
        if self._sink is not None:
            with self._guarded("failed to finish"):
                self._sink.close()
            self._sink = None

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # third-party code may raise anything
            self._sink = None
            text = str(error) or type(error).__name__
            self._alarm(f"{self._name} {what} and gets no more rows; metrics.jsonl has all of them: {text}")
