"""Time `dit-scale report` on a long record, and how soon a browser draws its charts; make a picture of it.

    python -m benchmarks.report --rows 1000000
    python -m benchmarks.report --page runs/demo/run/report.html --picture docs/images/report.png
    python -m benchmarks.report --smoke

The record has all keys of a log point, and the journal an entry for each. The browser is a headless Chromium,
whose part is left out if it is not installed. Its time is from the start of the navigation to the first frame
with charts.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_scale.config import TrainConfig, dump
from dit_scale.report.page.panels import PANELS

if TYPE_CHECKING:
    from playwright.sync_api import Browser

KEYS = tuple(key for panel in PANELS for key in panel.keys if not key.startswith("eval_"))
LOG_STEPS, EVALUATE_ROWS = 100, 50
OPENINGS = 7
WIDTH, HEIGHT = 1440, 1210
"""Window of the picture in pixels."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="log points (default 1000000)")
    parser.add_argument("--page", type=Path, help="measure this page instead of writing one")
    parser.add_argument("--picture", type=Path, help="also write a picture of the top of the page, PNG")
    parser.add_argument("--smoke", action="store_true", help="a short record")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row: dict[str, Any] = {}
        if args.page is None:
            row = write_page(Path(folder) / "long_run", 2_000 if args.smoke else args.rows)
        page = args.page or Path(folder) / "long_run" / "report.html"
        row |= {"megabytes": round(page.stat().st_size / 1e6, 2)}
        with browser() as chromium:
            if chromium:
                row |= open_page(chromium, page)
            if chromium and args.picture:
                take_picture(chromium, page, args.picture)
    print(json.dumps(row))
    return 0


def write_page(run: Path, rows: int) -> dict[str, Any]:
    """Write a run and its page; return how long the page took."""
    run.mkdir()
    (run / "config.yaml").write_text(
        dump(TrainConfig.model_validate({"run": str(run), "steps": 2 * LOG_STEPS * rows}))
    )
    values = np.random.default_rng(0).random((1009, len(KEYS))).round(6).tolist()
    begin_s = time.time() - rows
    entry = {"time_s": begin_s, "monotonic_s": 0.0, "event": "start", "attempt": 1, "step": 0}
    with (run / "metrics.jsonl").open("w") as record, (run / "events.jsonl").open("w") as journal:
        journal.write(f"{json.dumps(entry)}\n")
        for number in range(1, rows + 1):
            step = LOG_STEPS * number
            row = {"step": step, "samples": 256 * step, **dict(zip(KEYS, values[number % 1009], strict=True))}
            record.write(f"{json.dumps(row)}\n")
            entry |= {"time_s": begin_s + number, "monotonic_s": float(number), "event": "log", "step": step}
            journal.write(f"{json.dumps({**entry, 'data_s': 0.0})}\n")
            if number % EVALUATE_ROWS == 0:
                row = {"step": step, "eval_loss_raw": row["loss"], "eval_loss_ema.paper": row["loss"]}
                record.write(f"{json.dumps(row)}\n")
    start_s = time.monotonic()
    subprocess.run([sys.executable, "-m", "dit_scale.cli", "report", str(run)], check=True, stdout=sys.stderr)
    return {
        "rows": rows,
        "record_megabytes": round((run / "metrics.jsonl").stat().st_size / 1e6),
        "seconds": round(time.monotonic() - start_s, 1),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }


@contextmanager
def browser() -> "Iterator[Browser | None]":
    """Start a headless Chromium, if there is one."""
    program = shutil.which("chromium")
    if program is None:
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=program, args=arguments)
        yield chromium
        chromium.close()


def open_page(chromium: "Browser", path: Path) -> dict[str, Any]:
    """Open the page several times; return the median time to the first frame with charts."""
    times_ms = []
    for _ in range(OPENINGS):
        page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(path.resolve().as_uri())
        drawn = "performance.getEntriesByName('drawn')[0]?.startTime"
        times_ms.append(page.wait_for_function(drawn).json_value())
        page.close()
    return {"drawn_after_ms": round(median(times_ms)), "longest_ms": round(max(times_ms))}


def take_picture(chromium: "Browser", path: Path, out: Path) -> None:
    """Write a picture of the top of the page in light colours, with a palette to keep it small."""
    from PIL import Image

    page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("html[data-ready]")
    page.screenshot(path=out)
    page.close()
    with Image.open(out) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(out, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
