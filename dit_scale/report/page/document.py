"""The page: one HTML file that loads nothing. The door to Jinja.

Styles and scripts are inside the file, and its content security policy allows exactly these and pictures in
data URIs, by their hashes. So nothing that a run has written can load or run anything.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_scale import __version__
from dit_scale.report import words
from dit_scale.report.page import configs
from dit_scale.report.page.contents import RunPage
from dit_scale.report.page.curves import ALL_POINTS, MIN_POINTS, points_per_curve, summary
from dit_scale.report.page.panels import PANELS, Panel, series_of
from dit_scale.report.page.pictures import Picture, chosen, picture_of
from dit_scale.report.page.thinning import Curve
from dit_scale.train.evaluation_keys import FRECHET

if TYPE_CHECKING:
    from jinja2 import Template

FOLDER = Path(__file__).parent
STYLES = ("vendor/uPlot.min.css", "page.css")
SCRIPTS = ("vendor/uPlot.iife.min.js", "charts.js", "page.js")
MAX_BYTES = 2_000_000
"""Size of the file; pictures get what the rest leaves."""
MAX_ROWS = 50
"""Interruptions, alarms and nodes shown of one run; several runs share them, with at least 10 each."""
MAX_RESTARTS = 200
"""Restarts marked in the curves of a run."""
SECTIONS = (
    ("curves", "Curves"),
    ("timeline", "Failures"),
    ("ledger", "Time"),
    ("samples", "Samples"),
    ("scores", "Scores"),
    ("config", "Configuration"),
    ("environment", "Environment"),
)


def document(runs: Sequence[RunPage], now_s: float, reload_s: float | None = None) -> str:
    """Return the page about these runs at `now_s`; a browser loads it again every `reload_s` seconds."""
    points = ALL_POINTS
    while True:
        page = _Page(runs, now_s, reload_s, points)
        budget_bytes = MAX_BYTES - len(page.html([_Pictures() for _ in runs]).encode())
        if budget_bytes >= MAX_BYTES // 10 or points < MIN_POINTS:
            break
        points //= 2  # many runs with long tables
    return page.html([_pictures(run, max(0, budget_bytes) // len(runs)) for run in runs])


@dataclass(frozen=True)
class _Pictures:
    """The pictures of one run."""

    grids: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    """By EMA profile."""
    cards: Mapping[str, Picture] = field(default_factory=dict)
    """By the folder of the score card."""


def _pictures(run: RunPage, budget_bytes: int) -> _Pictures:
    """Choose the pictures of one run: those of score cards first, then grids."""
    cards: dict[str, Picture] = {}
    for card in run.cards:
        picture = picture_of(card.picture)
        if picture and len(picture.uri) <= budget_bytes:
            cards[card.where] = picture
            budget_bytes -= len(picture.uri)
    best = [run.status.best["step"]] if run.status.best else []
    share_bytes = budget_bytes // max(1, len(run.grids))
    grids = {profile: chosen(by_step, best, share_bytes) for profile, by_step in run.grids.items()}
    return _Pictures(grids, cards)


class _Page:
    """Everything on the page except for its pictures."""

    def __init__(self, runs: Sequence[RunPage], now_s: float, reload_s: float | None, points: int) -> None:
        """`points` limits those of all curves together."""
        self._runs = runs
        self._panels = [panel for panel in PANELS if any(series_of(panel, run.curves) for run in runs)]
        self._curves = _drawn(runs, points)
        self._context: dict[str, Any] = {
            "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
            "now_s": now_s,
            "reload_s": reload_s,
            "version": __version__,
            "sections": SECTIONS,
            "max_rows": max(10, MAX_ROWS // len(runs)),
            "several": len(runs) > 1,
            "panels": [_panel_view(panel, runs) for panel in self._panels],
            "missing": [panel.title for panel in PANELS if panel not in self._panels],
            "headings": _headings(runs),
            "recipe": runs[0].recipe.name if runs[0].recipe else "",
            "differences": configs.differences(runs[0].recipe, [run.config for run in runs]),
            "all_keys": list(dict.fromkeys(key for run in runs for key in run.config.text)),
            "environment": list(dict.fromkeys(name for run in runs for name in run.environment)),
        }

    def html(self, pictures: Sequence[_Pictures]) -> str:
        """Return the page with these pictures, one entry per run."""
        both = list(zip(self._runs, pictures, strict=True))
        strips = [strip for run, own in both for strip in _strips(run, own)]
        steps = sorted({picture["step"] for strip in strips for picture in strip["pictures"]})
        style, script = (
            "\n".join((FOLDER / name).read_text() for name in names) for names in (STYLES, SCRIPTS)
        )
        return _template().render(
            self._context,
            policy=_policy(style, script),
            style=style,
            script=script,
            grid_steps=steps,
            strips=strips,
            runs=[_run_view(run, own) for run, own in both],
            data={
                "reload_s": self._context["reload_s"],
                "panels": [_panel_data(panel, self._runs) for panel in self._panels],
                "grid_steps": steps,
                "strips": strips,
                "runs": [
                    {
                        "name": run.name,
                        "curves": curves,
                        "restarts": run.restarts[-MAX_RESTARTS:],
                    }
                    for run, curves in zip(self._runs, self._curves, strict=True)
                ],
            },
        )


def _drawn(runs: Sequence[RunPage], points: int) -> list[dict[str, Any]]:
    """Return the points of all curves, as many as the page may have; gaps are null."""
    limit = points_per_curve(points, sum(len(run.curves) for run in runs))
    drawn = []
    for run in runs:
        of_run = {}
        for key, curve in run.curves.items():
            thin = Curve(limit)
            thin.extend(curve.x, curve.y)
            y = [None if math.isnan(value) else float(f"{value:.5g}") for value in thin.y.tolist()]
            of_run[key] = {"x": thin.x.tolist(), "y": y}
        drawn.append(of_run)
    return drawn


def _panel_data(panel: Panel, runs: Sequence[RunPage]) -> dict[str, Any]:
    """Return what the charts need to know about a panel."""
    keys = {key for run in runs for key in run.curves}
    return {
        "name": panel.name,
        "title": panel.title,
        "unit": panel.unit,
        "series": [{"key": key, "label": label} for key, label in series_of(panel, keys).items()],
    }


def _panel_view(panel: Panel, runs: Sequence[RunPage]) -> dict[str, Any]:
    """Return a panel with the extremes of its curves, as a table and in words."""
    rows = [
        {"run": run.name, "label": label, **found}
        for run in runs
        for key, label in series_of(panel, run.curves).items()
        if (found := summary(run.curves[key]))
    ]
    spoken = []
    for row in rows:
        last, low, high = (words.number(row[name][0], panel.unit) for name in ("last", "min", "max"))
        name = f"{row['run']} {row['label']}" if len(runs) > 1 else row["label"]
        spoken.append(f"{name} is {last}, between {low} and {high}")
    return {**vars(panel), "rows": rows, "spoken": "; ".join(spoken) or "no finite value"}


def _run_view(run: RunPage, pictures: _Pictures) -> dict[str, Any]:
    """Return a run as the template shows it."""
    status, best = run.status, None
    if status.best:
        (key,) = status.best.keys() - {"step"}
        name = "Frechet distance" if key == FRECHET else "held-out loss"
        best = {"name": name, "value": status.best[key], "step": status.best["step"]}
    ends = list(accumulate(status.spent_s.values(), initial=0.0))
    ledger = [
        {"heading": heading, "begin": begin / status.wall_s, "share": seconds / status.wall_s}
        for (heading, seconds), begin in zip(status.spent_s.items(), ends, strict=False)
        if seconds
    ]
    return {
        **vars(run),
        "best": best,
        "ledger": ledger,
        "cards": [{**vars(card), "image": pictures.cards.get(card.where)} for card in run.cards],
    }


def _strips(run: RunPage, pictures: _Pictures) -> list[dict[str, Any]]:
    """Return a strip of grids through time per EMA profile; if there is none, one without pictures."""
    return [
        {
            "run": run.name,
            "profile": profile,
            "evaluations": len(run.grids.get(profile, ())),
            "pictures": [vars(picture) for picture in pictures.grids.get(profile, ())],
        }
        for profile in run.grids or ("",)
    ]


def _headings(runs: Sequence[RunPage]) -> list[str]:
    """Return the headings of the ledger on which any run has spent time."""
    return list(dict.fromkeys(name for run in runs for name, spent in run.status.spent_s.items() if spent))


def _policy(style: str, script: str) -> str:
    """Return the content security policy that allows this style and this script, and nothing from outside."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


@cache
def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {
        "duration": words.in_two_units,
        "moment": words.moment,
        "number": words.number,
        "share": lambda share: f"{100 * share:.3f}%",
    }
    return environment.get_template("page.html")
