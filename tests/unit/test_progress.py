"""Progress of a run: one line per log point in a log file, a bar on a terminal."""

import io
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dit_scale import image_progress
from dit_scale.image_progress import ImageProgress, duration
from dit_scale.telemetry import progress
from dit_scale.telemetry.progress import IMPORTANCE, RECENT, StatusLine, fit

RECORD = {"loss": 0.18125, "grad_norm": 0.25, "lr": 1e-4, "images_per_s": 1234.56}


class Screen:
    """A log file or a terminal, and the clocks that the status line reads."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        is_terminal: bool,
        width: int = 120,
        module: ModuleType = progress,
    ) -> None:
        self.now_s = 1000.0
        self._file = io.StringIO()
        shape = {"file": self._file, "force_terminal": is_terminal, "width": width, "color_system": None}
        clock = SimpleNamespace(monotonic=lambda: self.now_s, strftime=lambda form: f"<{form}>")
        monkeypatch.setattr(module, "Console", lambda stderr, **options: Console(**shape, **options))
        monkeypatch.setattr(module, "time", clock)

    @property
    def lines(self) -> list[str]:
        return self._file.getvalue().splitlines()


def test_a_line_has_the_time_of_day_the_numbers_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, is_terminal=False, width=80)
    status = StatusLine(total_steps=400_000, first_step=200, shown=True)
    screen.now_s += 50.0
    status.report(300, RECORD)
    assert screen.lines == [  # half a second for each of 399,700 steps
        "<%H:%M:%S>  step    300/400000  loss 0.1812  grad   0.250  lr 1.0e-04  "
        "  1234.6 img/s  left   55:30:50"
    ]


def test_the_time_left_follows_recent_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, is_terminal=False)
    status = StatusLine(total_steps=10_000, first_step=0, shown=True)
    left = []
    for point in range(1, 2 * RECENT + 1):
        screen.now_s += 1000.0 if point <= RECENT else 100.0  # the first steps are slow
        status.report(100 * point, RECORD)
        left.append(screen.lines[-1].partition("left")[2].strip())
    assert left[0] == duration(99 * 1000).strip()
    assert left[RECENT - 1] == duration(90 * 1000).strip()
    assert left[RECENT] == duration(89 * (9 * 1000 + 100) / 10).strip()
    assert left[-1] == duration(80 * 100).strip()


def test_nothing_is_left_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, is_terminal=False)
    status = StatusLine(total_steps=5, first_step=4, shown=True)
    screen.now_s += 3.0
    status.report(5, RECORD)
    status.report(5, RECORD)  # a log point right after a resume takes no step
    assert [line[-10:] for line in screen.lines] == ["   0:00:00"] * 2


def test_all_lines_of_a_run_are_equally_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, is_terminal=False)
    status = StatusLine(total_steps=400_000, first_step=0, shown=True)
    nothing = dict.fromkeys(("loss", "grad_norm"))
    for step, record in ((1, RECORD), (100, RECORD | {"grad_norm": 123.4}), (200, RECORD | {"lr": 0.0})):
        screen.now_s += 20.0
        status.report(step, record)
    status.report(400_000, RECORD | nothing)
    assert len({len(line) for line in screen.lines}) == 1
    assert "loss    nan" in screen.lines[3]


STATUS = {
    60: "loss 0.1812 left 2:45:50",
    80: "loss 0.1812 1234.6 img/s left 2:45:50",
    100: "loss 0.1812 grad 0.250 1234.6 img/s MFU 41.2% left 2:45:50",
    120: "<%H:%M:%S> loss 0.1812 grad 0.250 lr 1.0e-04 1234.6 img/s MFU 41.2% left 2:45:50",
}


@pytest.mark.parametrize("width", STATUS)
def test_a_terminal_has_a_bar_and_the_numbers_that_fit(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    screen = Screen(monkeypatch, is_terminal=True, width=width)
    status = StatusLine(total_steps=20_000, first_step=0, shown=True)
    screen.now_s += 50.0
    status.advance()
    status.report(100, RECORD | {"mfu": 0.412})
    status.close()
    last = next(line for line in reversed(screen.lines) if "step" in line).rpartition("step")[2]
    assert " ".join(last.split()).endswith(STATUS[width])
    assert last.split()[0] == "1/20000"


@given(st.integers(0, 150))
def test_a_status_fits_and_the_most_important_parts_are_kept(width: int) -> None:
    parts = {"time": "12:00:00", "loss": "loss 0.1", "lr": "lr 1e-4", "left": "left    0:10:00"}
    shown = fit(parts, width)
    assert len(shown) <= width
    names = [name for name in IMPORTANCE if name in parts]
    is_shown = [" ".join(parts[name].split()) in shown for name in names]
    assert is_shown == sorted(is_shown, reverse=True)


@pytest.mark.parametrize("mfu", [None, 0.5])
def test_a_log_line_has_the_utilization_if_it_is_known(
    monkeypatch: pytest.MonkeyPatch, mfu: float | None
) -> None:
    screen = Screen(monkeypatch, is_terminal=False)
    StatusLine(total_steps=10, first_step=0, shown=True).report(1, RECORD | {"mfu": mfu})
    assert ("MFU 50.0%" in screen.lines[0]) == (mfu is not None)
    assert "nan" not in screen.lines[0]


def test_the_cursor_stays_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed cannot show it again."""
    screen = Screen(monkeypatch, is_terminal=True)
    StatusLine(total_steps=10, first_step=0, shown=True)
    text = "".join(screen.lines)
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


def test_a_sum_of_fractions_reaches_the_last_image(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, is_terminal=True, module=image_progress)
    with ImageProgress(1) as progress:
        progress.show(sum([0.1] * 10))
    assert any("1/1" in line for line in screen.lines)


@pytest.mark.parametrize("title", ["runs/[red]", "[/x]", "{0}", ":cat:"])
def test_a_title_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, title: str) -> None:
    screen = Screen(monkeypatch, is_terminal=True, module=image_progress)
    with ImageProgress(100, title=title) as progress:
        progress.show(50.0)
    assert any(f"{title}:" in line for line in screen.lines)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_messages_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    screen = Screen(monkeypatch, is_terminal)
    status = StatusLine(total_steps=10, first_step=0, shown=True)
    message = "runs/[red]/[/x]/:cat: is a folder, [/gloo/pair.cc:1] a place in foreign code"
    status.say(message)
    status.close()
    assert any(line.endswith(message) for line in screen.lines)


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, is_terminal=False)
    status = StatusLine(total_steps=10, first_step=0, shown=False)
    status.report(1, RECORD)
    status.say("a note")
    assert screen.lines == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "   0:00:00"),
        (59.6, "   0:01:00"),
        (3599.4, "   0:59:59"),
        (93_789, "  26:03:09"),
        (3.6e7, "10000:00:00"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
