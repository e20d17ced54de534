"""The page of `dit-scale report` in a real browser: drawn, operated, accessible, and closed off."""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dit_scale.report.page.contents import RunReader, names_of
from dit_scale.report.page.document import document
from tests.support.needs import needs
from tests.support.report_runs import BREAKOUT, HOSTILE, JOURNAL, write_grid, write_run
from tests.support.speed import scaled

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
NOW_S = 5000.0
STEPS = 4000
BENIGN = ("minor", "moderate", None)
"""Impacts of axe-core's findings that are no faults here."""


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A headless Chromium."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    needs(program is not None, "chromium (apt-get install chromium)")
    for package in ("playwright", "axe_playwright_python"):
        needs(importlib.util.find_spec(package) is not None, f"{package} (pip install 'dit-scale[dev]')")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=program, args=arguments, timeout=scaled(120_000.0)
        )
        yield chromium
        chromium.close()


def rows(seed: int) -> list[dict[str, Any]]:
    """Return a record with every key that a chart shows, a spike, and a gap."""
    found: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        wave = 1 + ((step * (7 + seed)) % 13) / 100
        row: dict[str, Any] = {"step": 10 * step, "loss": 0.2 * wave, "mse": 0.19 * wave, "vb": 0.01 * wave}
        row |= {"grad_norm": wave, "lr": 1e-4, "skipped": 0, "images_per_s": 400 * wave, "loss_max": 2 * wave}
        row |= {f"loss_q{quarter}": wave / (quarter + 1) for quarter in range(4)}
        row |= {"update_ratio": 1e-4 * wave, "mfu": 0.4, "step_s_p50": 0.6, "step_s_p99": 0.7 * wave}
        row |= {
            "slowest_ratio": wave,
            "slowest_rank": step % 8,
            "data_wait": 0.01,
            "memory_gib": 30.0,
            "memory_peak_gib": 44.0,
        }
        found.append(row)
        if step % 500 == 0:
            found.append({"step": 10 * step, "eval_loss_raw": 0.3 * wave, "eval_frechet": 9 * wave})
    found[1234]["loss"], found[2345]["loss"] = 77.0, None
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two long runs, one of them with a hostile name and configuration."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first", rows=rows(0), steps=10 * STEPS)
    other = write_run(folder / HOSTILE, rows=rows(1), steps=10 * STEPS, log={"wandb_project": BREAKOUT})
    for step in range(0, 60, 10):
        for profile in ("paper", "short"):
            write_grid(first, step, side=96, profile=profile)
    return [first, other]


def write_page(out: Path, runs: list[str], reload_s: float | None = None) -> Path:
    """Write the page about these runs."""
    pages = [RunReader(run, name).read(NOW_S) for run, name in zip(runs, names_of(runs), strict=True)]
    out.write_text(document(pages, NOW_S, reload_s))
    return out


@contextmanager
def opened(
    browser: "Browser", path: Path, width: int = 1440, theme: str = "light", own_clock: bool = False
) -> "Iterator[Page]":
    """Open a page; at the end, it must have logged nothing, asked nothing, and requested only itself."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(scaled(120_000.0))
    seen: list[str] = []
    page.on("console", lambda message: seen.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (seen.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: seen.append(f"request: {request.url}"))
    url = path.as_uri()
    if own_clock:
        page.clock.install()
    page.goto(url)
    page.wait_for_selector("html[data-ready]")
    yield page
    context.close()
    assert [one for one in seen if one != f"request: {url}" and not one.startswith("request: data:")] == []


def drawn_points(page: "Page") -> int:
    """Return the number of points of all drawn lines."""
    lines = page.evaluate("charts.map((chart) => chart.plot.data.slice(1))")
    return sum(isinstance(y, int | float) for chart in lines for line in chart for y in line)


def zoom_of(page: "Page") -> list[float]:
    """Return the steps that every chart shows; they must agree."""
    ranges = page.evaluate("charts.map((c) => [c.plot.scales.x.min, c.plot.scales.x.max])")
    assert all(one == ranges[0] for one in ranges)
    return list(ranges[0])


def drag(page: "Page", panel: str, begin: float, end: float) -> None:
    """Drag over a chart, from and to these shares of its width."""
    place = page.locator(f"[data-panel={panel}] .u-over")
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    assert box is not None
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + begin * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], y, steps=4)
    page.mouse.up()


def test_every_curve_is_drawn_and_keeps_its_spike(
    browser: "Browser", runs: list[str], tmp_path: Path
) -> None:
    with opened(browser, write_page(tmp_path / "page.html", runs)) as page:
        data = json.loads(str(page.locator("#data").text_content()))
        points = sum(
            y is not None for run in data["runs"] for curve in run["curves"].values() for y in curve["y"]
        )
        assert drawn_points(page) == points
        assert 20_000 < points <= 60_000
        assert page.evaluate("Math.max(...charts[0].plot.data[1].filter((y) => y))") == 77.0
        assert page.evaluate("charts[0].plot.data[1].includes(null)")
        pixels = page.evaluate(
            "[...document.querySelectorAll('.chart canvas')].map((canvas) => new Set(new Uint32Array("
            "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size)"
        )
        assert len(pixels) == len(data["panels"])
        assert min(pixels) > 10


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_accessible_and_within_the_window(
    browser: "Browser", runs: list[str], tmp_path: Path, width: int, theme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    for number, chosen in enumerate((runs[:1], runs)):
        with opened(browser, write_page(tmp_path / f"{number}.html", chosen), width, theme) as page:
            assert page.evaluate("document.documentElement.scrollWidth") == width
            page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            found = Axe().run(page).response["violations"]
            assert [
                (one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] not in BENIGN
            ] == []


def test_zoom_by_mouse_fields_and_keys(browser: "Browser", runs: list[str], tmp_path: Path) -> None:
    with opened(browser, write_page(tmp_path / "page.html", runs)) as page:
        whole = zoom_of(page)
        assert whole == [10, 10 * STEPS]
        drag(page, "loss", 0.25, 0.5)
        low, high = zoom_of(page)
        assert (low, high) == pytest.approx((0.25 * whole[1], 0.5 * whole[1]), rel=0.02)
        assert page.locator("#zoom-from").input_value() == str(round(low))
        page.locator("#reset").click()
        assert zoom_of(page) == whole
        page.locator("#zoom-to").fill("20000")
        page.locator("#zoom-to").press("Enter")
        assert zoom_of(page) == [10, 20000]
        page.locator("[data-panel=lr]").press("Escape")
        assert zoom_of(page) == whole
        drag(page, "mfu", 0.5, 0.75)
        page.locator("[data-panel=mfu] .u-over").dblclick()
        assert zoom_of(page) == whole


def test_one_cursor_for_all_charts_by_mouse_and_by_keys(
    browser: "Browser", runs: list[str], tmp_path: Path
) -> None:
    with opened(browser, write_page(tmp_path / "page.html", runs)) as page:
        page.locator("[data-panel=grad_norm]").press("ArrowRight")
        page.locator("[data-panel=grad_norm]").press("ArrowRight")
        steps = page.evaluate("charts.map((c) => c.plot.data[0][c.plot.cursor.idx])")
        assert max(steps[:1]) < 200
        said = str(page.locator("#announce").text_content())
        assert said.startswith(f"step {steps[5]}: first norm ")
        assert f"{HOSTILE} norm" in said
        page.locator("[data-panel=loss] .u-over").hover()
        steps = page.evaluate("charts.map((c) => c.plot.data[0][c.plot.cursor.idx])")
        assert max(steps) - min(steps) <= 5000 / 100 + 5000  # evaluations are 5,000 steps apart
        assert str(page.locator("#readout").text_content()).startswith("Step ")


def test_lines_scales_themes_and_samples_can_be_switched(
    browser: "Browser", runs: list[str], tmp_path: Path
) -> None:
    with opened(browser, write_page(tmp_path / "page.html", runs)) as page:
        page.get_by_label("log axis of Training loss").uncheck()
        assert page.evaluate("charts[0].plot.scales.y.distr") == 1
        page.locator("[data-keys=loss] button").first.click()
        page.locator("#run-1").uncheck()
        shown = page.evaluate(
            "charts[0].lines.map((line, i) => [line.run, line.key, charts[0].plot.series[i + 1].show])"
        )
        assert {(run, key) for run, key, is_shown in shown if is_shown} == {
            (0, "mse"),
            (0, "vb"),
            (0, "loss_max"),
        }
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.locator("#theme").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        slider = page.locator("#grid")
        slider.press("Home")
        assert page.locator("#grid-step").text_content() == "step 0"
        slider.press("ArrowRight")
        assert slider.get_attribute("aria-valuetext") == "step 10"
        for number, profile in enumerate(("paper", "short")):
            alt = page.locator(f"[data-grid='{number}']").get_attribute("alt")
            assert alt == f"Samples of first, EMA profile {profile}, at step 10"
        assert page.evaluate("document.querySelector('[data-grid]').naturalWidth") == 96


def test_a_watched_page_follows_and_keeps_its_place(
    browser: "Browser", runs: list[str], tmp_path: Path
) -> None:
    """The clock of the page is the test's, so that it loads itself again when the test wants it to."""
    with opened(browser, write_page(tmp_path / "page.html", runs, reload_s=1000.0), own_clock=True) as page:
        drag(page, "mfu", 0.25, 0.75)
        zoom, top = zoom_of(page), page.evaluate("scrollY")
        assert top > 0
        page.evaluate("window.before = true")
        page.clock.fast_forward(500_000)
        assert page.evaluate("window.before")
        with page.expect_event("load"):
            page.clock.fast_forward(500_000)
        page.wait_for_selector("html[data-ready]")
        assert not page.evaluate("window.before")
        assert (zoom_of(page), page.evaluate("scrollY")) == (zoom, top)
        page.locator("#pause").click()
        page.evaluate("window.before = true")
        page.clock.fast_forward(5_000_000)
        assert page.evaluate("window.before")


@pytest.mark.parametrize("what", ["empty", "one point", "only gaps"])
def test_a_run_with_hardly_anything(browser: "Browser", tmp_path: Path, what: str) -> None:
    records: dict[str, list[dict[str, Any]]] = {
        "empty": [],
        "one point": [{"step": 5, "loss": 1.0, "mfu": 0.5}],
        "only gaps": [{"step": step, "loss": None, "lr": 0} for step in (5, 6)],
    }
    run = write_run(tmp_path / "run", JOURNAL[:1], rows=records[what])
    with opened(browser, write_page(tmp_path / "page.html", [run])) as page:
        assert page.locator(".chart canvas").count() == {"empty": 0}.get(what, 2)


def test_it_can_be_printed(browser: "Browser", runs: list[str], tmp_path: Path) -> None:
    with opened(browser, write_page(tmp_path / "page.html", runs), theme="dark") as page:
        assert page.pdf(format="A4").startswith(b"%PDF")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
