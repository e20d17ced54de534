"""The factor by which limits of tests grow on a slow machine."""

import subprocess
import sys

import pytest

from tests.support import speed


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test measures is forgotten after it."""
    monkeypatch.setenv(speed.VARIABLE, "1.0")
    monkeypatch.delenv(speed.VARIABLE)


def test_limits_grow_with_the_time_that_work_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for took_s, factor in [(0.5, 1.0), (1.0, 1.0), (7.0, 7.0)]:
        monkeypatch.delenv(speed.VARIABLE, raising=False)
        times_s = iter([100.0, *[took_s * speed.REFERENCE_S] * 7, 100.0])  # two of nine were interrupted
        monkeypatch.setattr(speed, "_work", times_s.__next__)
        assert speed.scaled(400.0) == speed.scaled(400.0) == pytest.approx(400.0 * factor)


def test_processes_of_a_test_have_the_same_limits() -> None:
    ours = speed.slowness()
    told = subprocess.check_output(
        [sys.executable, "-c", "from tests.support import speed; print(speed.slowness())"]
    )
    print(f"work takes {ours:.2f} times as long as on the reference")
    assert float(told) == ours >= 1.0
