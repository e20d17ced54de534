"""Everything that the page shows about one run."""

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_scale.errors import DitScaleError
from dit_scale.evaluate.paper import rows_beside
from dit_scale.evaluate.scorecard import CARD, read_card
from dit_scale.journal import Event
from dit_scale.report.page import timeline
from dit_scale.report.page.configs import NO_KEYS, Keys, Recipe, keys_of, nearest_recipe
from dit_scale.report.page.curves import Curves, summary
from dit_scale.report.page.environment import environment_of
from dit_scale.report.page.pictures import grids_of
from dit_scale.report.page.thinning import Curve
from dit_scale.report.page.timeline import Timeline
from dit_scale.report.status import RunContents, Status, read_contents, status_from

SAMPLES, ERRORS = "samples", "errors"
MAX_FILES = 10


@dataclass(frozen=True)
class ScoreCard:
    """A score card below the run folder."""

    where: str
    """The folder, relative to the run."""
    tree: Mapping[str, Any]
    """As `dit_scale.evaluate.scorecard` writes it; empty if it cannot be read."""
    problem: str
    picture: Path
    """The grid of these samples, if there is one."""


@dataclass(frozen=True)
class RunPage:
    """What the page shows about one run."""

    name: str
    status: Status
    curves: Mapping[str, Curve]
    latest: Mapping[str, float]
    """Last finite value of each curve."""
    restarts: list[tuple[int, str]]
    """Step from which an attempt resumed, and what ended the attempt before it."""
    timeline: Timeline | None
    causes: list[str]
    failures: list[tuple[str, list[int], int]]
    """Node, failures by cause, steps lost."""
    alarms: list[tuple[float, str]]
    tracebacks: list[str]
    """The newest files with tracebacks of ranks, relative to the run."""
    grids: dict[str, dict[int, Path]]
    """By EMA profile and step."""
    cards: list[ScoreCard]
    paper: list[dict[str, Any]]
    """The paper's figures for this model, to show without a score card."""
    config: Keys
    recipe: Recipe | None
    environment: dict[str, str]


class RunReader:
    """Reads one run again and again; the record only as far as it has grown."""

    def __init__(self, run: str, name: str) -> None:
        self._run, self._name = run, name
        self._curves = Curves(Path(run) / "metrics.jsonl")

    def read(self, now_s: float) -> RunPage:
        """Return the run at `now_s` (since 1970). Raises ConfigError if the folder contains no run."""
        contents = read_contents(self._run, now_s)
        status = status_from(contents, self._run, now_s)
        self._curves.update()
        curves = dict(self._curves.by_key)
        latest = {key: summary(curve)["last"][0] for key, curve in curves.items() if summary(curve)}
        causes, failures = timeline.by_cause(status.interruptions)
        config, folder = contents.config, Path(self._run)
        return RunPage(
            name=self._name,
            status=status,
            curves=curves,
            latest=latest,
            restarts=_restarts(contents, status),
            timeline=timeline.timeline_of(
                contents.attempts,
                contents.rounds,
                contents.supervisors,
                status.interruptions,
                now_s if status.state in ("running", "waiting") else 0.0,
            ),
            causes=causes,
            failures=failures,
            alarms=_alarms(contents),
            tracebacks=[
                f"{ERRORS}/{path.name}" for path in sorted((folder / ERRORS).glob("*.txt"))[-MAX_FILES:]
            ],
            grids=grids_of(folder),
            cards=cards_of(folder),
            paper=_paper_rows(contents),
            config=keys_of(config) if config else NO_KEYS,
            recipe=nearest_recipe(config) if config else None,
            environment=environment_of(contents, status),
        )


def names_of(runs: Sequence[str]) -> list[str]:
    """Return a name for each run: its folder, with as many parents as it takes to tell them apart."""
    paths = [Path(os.path.abspath(run)) for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _restarts(contents: RunContents, status: Status) -> list[tuple[int, str]]:
    """Return where attempts resumed, and why: the last interruption before each of them."""
    found = []
    for attempt in contents.attempts[1:]:
        before = [one for one in status.interruptions if one.at_s <= attempt.start_us / 1e6]
        cause = f"{before[-1].reason} {before[-1].node}".strip() if before else "restarted"
        found.append((attempt.first_step, f"attempt {attempt.number}: {cause}"))
    return found


def _alarms(contents: RunContents) -> list[tuple[float, str]]:
    """Return time and text of the alarms."""
    alarms = [entry for entry in contents.journal if entry["event"] == Event.ALARM]
    return [(entry["time_s"], str(entry.get("text", ""))) for entry in alarms]


def cards_of(run: Path) -> list[ScoreCard]:
    """Return the score cards of sample folders in the run."""
    found = []
    for path in sorted(run.glob(f"{SAMPLES}*/{CARD}")):
        tree, problem = dict[str, Any](), ""
        try:
            tree = read_card(str(path))
        except DitScaleError as error:
            problem = str(error)
        found.append(ScoreCard(path.parent.name, tree, problem, path.parent / "grid.png"))
    return found


def _paper_rows(contents: RunContents) -> list[dict[str, Any]]:
    """Return the paper's figures for the model of a run without guidance."""
    if contents.config is None:
        return []
    model = contents.config.model
    protocol = {
        "model": model.model_dump(mode="json"),
        "image_size": model.image_size,
        "sampling": {"guidance": 1.0},
    }
    return [{"row": row.label, **row.figures} for row in rows_beside(protocol)]
