"""Curves of the report: thinned without losing a spike, a gap or the last point, and read in a stream."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.report.page.curves import MAX_POINTS, Curves, points_per_curve, summary
from dit_scale.report.page.panels import PANELS, series_of
from dit_scale.report.page.thinning import Curve, thinned

VALUES = st.one_of(st.floats(-100, 100), st.just(float("nan")))
POINTS = st.lists(st.tuples(st.integers(1, 50), VALUES), min_size=1, max_size=300)


def arrays(points: list[tuple[int, float]]) -> tuple[Any, Any]:
    """Return x and y, given distances between the values of x."""
    x = np.cumsum([distance for distance, _ in points])
    return x, np.array([value for _, value in points])


@given(POINTS, st.integers(8, 60), st.lists(st.integers(1, 299), max_size=4))
def test_spikes_gaps_and_the_last_point_survive(
    points: list[tuple[int, float]], limit: int, cuts: list[int]
) -> None:
    x, y = arrays(points)
    curve = Curve(limit)
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(x)], strict=True):
        curve.extend(x[begin:end], y[begin:end])
    assert len(curve.x) <= limit
    assert set(zip(curve.x.tolist(), map(str, curve.y.tolist()), strict=True)) <= set(
        zip(x.tolist(), map(str, y.tolist()), strict=True)
    )
    assert (curve.x[-1], str(curve.y[-1])) == (x[-1], str(y[-1]))
    assert np.isnan(curve.y).any() == np.isnan(y).any()
    if not np.isnan(y).all():
        assert (np.nanmin(curve.y), np.nanmax(curve.y)) == (np.nanmin(y), np.nanmax(y))


@given(st.integers(600, 3000), st.integers(8, 100), st.integers(1, 500))
def test_a_curve_is_no_coarser_than_its_limit_asks_for(num: int, limit: int, chunk: int) -> None:
    """However many chunks it comes in: its buckets are at most twice as wide as the finest that fit."""
    x, y = np.arange(num) * 3, np.random.default_rng(num).random(num)
    curve = Curve(limit)
    for begin in range(0, num, chunk):
        curve.extend(x[begin : begin + chunk], y[begin : begin + chunk])
    width = next(2**power for power in range(30) if len(thinned(x, y, 2**power)[0]) <= limit)
    assert {*thinned(x, y, 2 * width)[0].tolist()} <= {*curve.x.tolist()}


@given(POINTS, st.integers(0, 5), st.integers(0, 5), st.integers(1, 299))
def test_thinning_in_parts_equals_thinning_at_once(
    points: list[tuple[int, float]], power: int, more: int, cut: int
) -> None:
    x, y = arrays(points)
    fine, coarse = 2**power, 2 ** (power + more)
    parts = [thinned(x[part], y[part], fine) for part in (slice(0, cut), slice(cut, None)) if len(x[part])]
    again = thinned(*(np.concatenate(columns) for columns in zip(*parts, strict=True)), coarse)
    for got, expected in zip(again, thinned(x, y, coarse), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_every_bucket_keeps_its_smallest_and_largest_value() -> None:
    x = np.arange(1000)
    y = np.sin(x) + (x == 523) * 50.0 - (x == 777) * 50.0
    thin_x, thin_y = thinned(x, y, 100)
    for bucket in range(10):
        kept, every = thin_y[thin_x // 100 == bucket], y[x // 100 == bucket]
        assert (kept.min(), kept.max()) == (every.min(), every.max())
        assert len(kept) == (3 if bucket == 9 else 2)  # the last bucket also keeps the last point


def test_a_short_curve_keeps_every_point() -> None:
    curve = Curve(MAX_POINTS)
    curve.extend(np.arange(MAX_POINTS) * 100, np.arange(MAX_POINTS) % 7.0)
    assert len(curve.x) == MAX_POINTS


def test_a_step_taken_again_is_sorted_in() -> None:
    curve = Curve(8)
    for x in ([10, 20, 30], [20, 30, 40]):
        curve.extend(np.array(x), np.ones(3))
    assert curve.x.tolist() == [10, 20, 20, 30, 30, 40]


def write(path: Path, *lines: str, mode: str = "w") -> None:
    with path.open(mode) as file:
        file.write("".join(lines))


def row(step: int, **values: Any) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def read(path: Path) -> dict[str, Any]:
    curves = Curves(path)
    curves.update()
    return {
        key: (curve.x.tolist(), [None if np.isnan(y) else y for y in curve.y])
        for key, curve in curves.by_key.items()
    }


def test_what_is_no_number_is_a_gap_and_what_is_no_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(
        path,
        row(1, loss=0.5, samples=4),
        '{"step": 2, "loss": NaN}\n{"step": 3, "loss": Infinity}\n{"step": 4, "loss": -1e999}\n',
        row(5, loss=None),
        row(6, loss="<b>", unknown=3),
        row(7, loss=10**400),
        row(8, loss=True),
        row(9, loss=2),
        '{"step": "10", "loss": 1}\n{"step": -1, "loss": 1}\n{"step": 1e3, "loss": 1}\n[1]\n\x00\xff\n',
        row(2**60, loss=1),
        '{"step": 11, "loss": 1',
    )
    assert read(path) == {"loss": ([*range(1, 10)], [0.5, None, None, None, None, None, None, None, 2.0])}


def test_only_new_rows_are_read_and_a_torn_line_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curves = Curves(path)
    curves.update()
    assert curves.by_key == {}
    write(path, row(1, loss=1.0), '{"step": 2, "lo')
    curves.update()
    assert curves.by_key["loss"].x.tolist() == [1]
    write(path, 'ss": 3.0}\n', row(3, loss=2.0), mode="a")
    curves.update()
    assert curves.by_key["loss"].y.tolist() == [1.0, 3.0, 2.0]


def test_the_record_of_a_new_attempt_replaces_the_old_one(tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "0002.jsonl"
    write(path, row(1, loss=1.0), row(2, loss=2.0), row(3, loss=3.0))
    curves = Curves(path)
    curves.update()
    write(other, row(1, loss=1.0), row(2, loss=9.0), row(3, loss=9.0), row(4, loss=9.0))
    other.replace(path)
    curves.update()
    assert curves.by_key["loss"].y.tolist() == [1.0, 9.0, 9.0, 9.0]


def test_a_long_record_needs_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 60_001):
            file.write(row(step, loss=77.5 if step == 31_337 else 0.5))
    curves = Curves(path)
    curves.update()
    assert len(curves.by_key["loss"].x) <= MAX_POINTS
    buckets = np.bincount(curves.by_key["loss"].x * 250 // 60_001, minlength=250)
    assert buckets.min() > 0  # no part of the run is left out
    assert summary(curves.by_key["loss"])["max"] == (77.5, 31_337)
    assert summary(curves.by_key["loss"])["last"] == (0.5, 60_000)


@pytest.mark.parametrize(("curves", "points"), [(0, 1500), (20, 1500), (80, 750), (100_000, 50)])
def test_many_curves_share_the_points_of_a_page(curves: int, points: int) -> None:
    assert points_per_curve(60_000, curves) == points


def test_keys_by_pattern_become_series_with_labels() -> None:
    (held_out,) = [panel for panel in PANELS if panel.name == "held_out"]
    keys = ["loss", "eval_loss_raw", "eval_loss_ema.b", "eval_mse_raw"]
    assert series_of(held_out, keys) == {"eval_loss_ema.b": "ema.b", "eval_loss_raw": "raw"}
    assert len({key for panel in PANELS for key in series_of(panel, keys)}) == len(keys)
