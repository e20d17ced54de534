"""The report of a campaign, as JSON and as Markdown."""

import platform
from collections import Counter
from dataclasses import dataclass, field
from importlib import metadata
from statistics import median
from typing import Any

from tests.chaos.hunt import WORLD, Kill
from tests.chaos.stacks import SECTIONS

PACKAGES = ("dit-scale", "torch", "deepspeed", "py-spy")
MIN_SHARE_IN_SAVE = 0.25
BAR_WIDTH = 40


@dataclass
class StageResult:
    """The killed run of one ZeRO stage."""

    stage: int
    steps: int
    """Steps of the complete run."""
    wanted: int
    """Number of kills to deliver."""
    kills: list[Kill] = field(default_factory=list)
    """The kills that count."""
    kills_at_start: list[Kill] = field(default_factory=list)
    """The extra kills during a start."""
    problems: list[str] = field(default_factory=list)
    """Mismatches, and runs that failed on their own. None is expected."""
    rows_compared: int = 0
    averages_compared: int = 0
    """Steps at which both runs stored averages."""


@dataclass
class Campaign:
    """All stages."""

    seed: int
    stages: list[StageResult] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def kills(self) -> list[Kill]:
        return [kill for stage in self.stages for kill in stage.kills]

    @property
    def problems(self) -> list[str]:
        return [f"ZeRO-{stage.stage}: {text}" for stage in self.stages for text in stage.problems]

    @property
    def share_in_save(self) -> float:
        return sum(kill.in_save for kill in self.kills) / max(1, len(self.kills))

    @property
    def passed(self) -> bool:
        return not self.problems and self.share_in_save >= MIN_SHARE_IN_SAVE


def as_tree(campaign: Campaign) -> dict[str, Any]:
    """Return the content of report.json."""
    return {
        "passed": campaign.passed,
        "seed": campaign.seed,
        "kills": len(campaign.kills),
        "mismatches": campaign.problems,
        "share_in_save": campaign.share_in_save,
        "cycle_s_median": _cycle_s(campaign.kills),
        "wall_s": round(campaign.wall_s, 1),
        "victims": histogram(campaign.kills),
        "writers": writers_histogram(campaign.kills),
        "versions": versions(),
        "stages": [
            {
                **{key: value for key, value in vars(stage).items() if not key.startswith("kills")},
                "kills": [{**vars(kill), "in_save": kill.in_save} for kill in stage.kills],
                "kills_at_start": [vars(kill) for kill in stage.kills_at_start],
            }
            for stage in campaign.stages
        ],
    }


def as_text(campaign: Campaign) -> str:
    """Return the content of report.md."""
    kills = campaign.kills
    at_start = [kill for stage in campaign.stages for kill in stage.kills_at_start]
    aims = ", ".join(f"{aim} {count}" for aim, count in Counter(kill.aim for kill in kills).items())
    lines = [
        "# Random kills",
        "",
        f"- {len(kills)} kills (SIGKILL) of runs on {WORLD} processes, in {campaign.wall_s / 60:.1f} min; "
        f"one cycle of start, steps and kill takes {_cycle_s(kills):.1f} s (median)",
        f"- mismatches: {len(campaign.problems)}",
        f"- inside a save: {campaign.share_in_save:.0%} (a snapshot, a working writer, or the last wait)",
        f"- moments: {aims}; {len(at_start)} extra kills during the start",
        f"- verdict: {'passed' if campaign.passed else 'FAILED'}",
        f"- seed {campaign.seed}; {', '.join(f'{k} {v}' for k, v in versions().items())}",
        "",
        "After every kill the record so far is compared with that of an undisturbed run. After the last step",
        "the record, the last file of every rank (masters, moments, averages) and the stored averages are",
        "compared bit for bit.",
        "",
        "| ZeRO | kills | steps | resumed at steps | rows compared | averages compared | mismatches |",
        "|---|---|---|---|---|---|---|",
        *(_stage_line(stage) for stage in campaign.stages),
        "",
        "## Where the victim was",
        "",
        *_bars(histogram(kills)),
        "",
        "## What the busiest writer was doing",
        "",
        *_bars(writers_histogram(kills)),
        "",
        "## Kills during the start",
        "",
        *_bars({name: count for name, count in histogram(at_start).items() if count}),
        "",
    ]
    if campaign.problems:
        lines += ["## Mismatches", "", *(f"- {problem}" for problem in campaign.problems), ""]
    return "\n".join(lines)


def histogram(kills: list[Kill]) -> dict[str, int]:
    """Count kills by the section of the victim, with all sections."""
    counts = Counter(kill.section for kill in kills)
    return {section: counts[section] for section in SECTIONS}


def writers_histogram(kills: list[Kill]) -> dict[str, int]:
    """Count kills by what the busiest writer was doing."""
    order = ("retention", "committing", "reading again", "writing", "starting", "unknown", "idle")
    counts = Counter(next((name for name in order if name in kill.writers), "none") for kill in kills)
    return {name: counts[name] for name in (*order, "none")}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def _cycle_s(kills: list[Kill]) -> float:
    return median(kill.cycle_s for kill in kills) if kills else 0.0


def _stage_line(stage: StageResult) -> str:
    resumed = sorted({kill.resumed_step for kill in stage.kills})
    span = f"{len(resumed)} between {resumed[0]} and {resumed[-1]}" if resumed else "none"
    cells = (
        stage.stage,
        f"{len(stage.kills)} of {stage.wanted}",
        stage.steps,
        span,
        stage.rows_compared,
        stage.averages_compared,
        len(stage.problems),
    )
    return f"| {' | '.join(map(str, cells))} |"


def _bars(counts: dict[str, int]) -> list[str]:
    scale = BAR_WIDTH / max([1, *counts.values()])
    return [
        "```",
        *(f"{name:<28}{count:>5}  {'#' * round(count * scale)}".rstrip() for name, count in counts.items()),
        "```",
    ]
