"""What the progress of sampling in bulk counts and prints, on a clock of its own."""

from collections.abc import Iterator

import pytest

from dit_scale import image_progress
from dit_scale.image_progress import LINE_S, ImageProgress
from dit_scale.inference import sampling_progress
from dit_scale.inference.sampling_progress import COUNT_S, SampledImages, SamplingProgress


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def strftime(self, form: str) -> str:
        return "12:00:00"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    for module in (image_progress, sampling_progress):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_other_processes_are_counted_rarely_and_nothing_twice(clock: Clock) -> None:
    counts = iter([40, 60])
    images = SampledImages(lambda: next(counts))
    for _ in range(1000):
        images.advance(0.01)
        assert images.done() <= 50
    images.commit(8)
    assert images.done() == pytest.approx(50)
    clock.now_s += COUNT_S
    # 60 are committed, 8 of them by this process, whose 10 are counted by its steps
    assert images.done() == pytest.approx(62)


def test_a_line_every_30_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with SamplingProgress(1000, lambda: 100, shown=True) as progress:
        for _ in range(60):
            clock.now_s += 1.0
            progress.advance(2.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "12:00:00  160/1000 images  2.0 images/s  left 0:07:00",
        "12:00:00  220/1000 images  2.0 images/s  left 0:06:30",
    ]
    assert len(lines) == 60 / LINE_S


def test_a_title_is_shown_literally(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ImageProgress(100, title="features of [red]/:x:") as progress:
        clock.now_s += LINE_S
        progress.show(50.5)
    assert capsys.readouterr().err == (
        "12:00:00  features of [red]/:x:: 50/100 images  1.7 images/s  left 0:00:29\n"
    )


def test_only_the_first_worker_shows_and_counts(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def count() -> int:
        raise AssertionError

    with SamplingProgress(1000, count, shown=False) as progress:
        clock.now_s += 100
        progress.advance(1)
        progress.commit(1)
    assert capsys.readouterr().err == ""
