"""Progress of sampling in bulk: one worker shows what all of them have done."""

import time
from collections.abc import Callable

from dit_scale.image_progress import ImageProgress

COUNT_S = 10.0
"""Seconds between two counts of what all processes have committed."""


class SampledImages:
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
        self._shown = shown
        self._images = SampledImages(count_committed if shown else lambda: 0)
        self._display = ImageProgress(num_images, done=self._images.before, shown=shown)

    def __enter__(self) -> "SamplingProgress":
        self._display.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.__exit__(*error)

    def advance(self, images: float) -> None:
        """Count a fraction of this process's images, and show it."""
        self._images.advance(images)
        if self._shown:
            self._display.show(self._images.done())

    def commit(self, images: int) -> None:
        """Count images that this process has committed."""
        self._images.commit(images)
