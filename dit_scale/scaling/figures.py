"""The figures of a study, with the content of Figures 2, 5, 6, 8, 9 and 10 of the paper.

Every function draws one figure of one metric. Where a figure has one value per run, a second panel shows the
paper's own runs. Colours tell model sizes apart, markers patch sizes, line styles conditioning designs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_scale.models.zoo import CONDITIONINGS, SIZES, Conditioning
from dit_scale.scaling.canvas import COLOURS, LINES, MARKERS, Canvas, log_axis, style
from dit_scale.scaling.config import training_flops
from dit_scale.scaling.results import (
    FID,
    FRECHET,
    HELD_OUT,
    LOSS,
    WATCHED,
    RunResult,
    fit,
    paper_results,
)

if TYPE_CHECKING:
    from dit_scale.scaling.canvas import Axes

LABELS = {
    LOSS: "training loss",
    HELD_OUT: "held-out loss",
    WATCHED: "Frechet distance, few images",
    FRECHET: "Frechet distance",
    FID: "FID-50K",
}
DESIGNS: dict[Conditioning, str] = {
    "adaln_zero": "adaLN-Zero",
    "adaln": "adaLN",
    "cross_attention": "cross-attention",
    "in_context": "in-context",
}
GMACS_LABEL = 'GMACs of a forward pass (the paper\'s "Gflops")'
BUBBLE_POINTS = 1600.0
"""Area of the largest bubble, in square points."""


@dataclass(frozen=True)
class Subject:
    """What one panel shows: runs, their metric, the design that fits and comparisons hold fixed."""

    title: str
    results: Sequence[RunResult]
    metric: str
    design: Conditioning

    @property
    def label(self) -> str:
        """Name of the metric for an axis."""
        return LABELS[self.metric]

    def finished(self) -> list[RunResult]:
        """Return the runs of the fixed design that have a final value, the cheapest first."""
        chosen = [
            one for one in self.results if one.conditioning == self.design and self.metric in one.metrics
        ]
        return sorted(chosen, key=lambda one: one.gmacs)

    def with_curves(self) -> list[RunResult]:
        """Return the runs of the fixed design that have a curve, the cheapest first."""
        chosen = [
            one for one in self.results if one.conditioning == self.design and self.metric in one.curves
        ]
        return sorted(chosen, key=lambda one: one.gmacs)

    def value(self, result: RunResult) -> float:
        """Return the final value of a run."""
        return result.metrics[self.metric]


def draw_all(
    results: Sequence[RunResult], metrics: Iterable[str], design: Conditioning, folder: Path
) -> list[Path]:
    """Draw every figure for which the runs have data, as PNG and SVG; return the files."""
    written = []
    published = Subject("the paper, ImageNet at 256 px", paper_results(), FID, "adaln_zero")
    for metric in metrics:
        own = Subject("this study", results, metric, design)
        for name, draw in FIGURES.items():
            with style():
                if canvas := draw([published] if metric == FID else [own, published]):
                    written += canvas.save(folder / f"{name}_{metric}")
    return written


# One value per run


def draw_models(subjects: Sequence[Subject]) -> Canvas | None:
    """Draw quality by model; the area of a bubble is proportional to GMACs (Figure 2)."""
    if not subjects[0].finished():
        return None
    canvas = Canvas("Quality by model; area: GMACs", len(subjects))
    for column, subject in enumerate(subjects):
        axes, runs = canvas.panel(0, column), subject.finished()
        sizes = _sizes(runs)
        for one in runs:
            place, value, colour = sizes.index(one.size), subject.value(one), _patch_colour(one.patch)
            area = BUBBLE_POINTS * one.gmacs / runs[-1].gmacs
            axes.scatter(place, value, area, color=colour, alpha=0.55, linewidths=0)
            axes.scatter(place, value, 8, color=colour, marker=_marker(one.patch))
        axes.set_xticks(range(len(sizes)), [f"DiT-{size}" for size in sizes])
        axes.set_xlim(-0.6, len(sizes) - 0.4)
        axes.margins(y=0.2)
        axes.set_ylabel(subject.label)
        axes.set_title(subject.title)
    patches = _patches([one for subject in subjects for one in subject.finished()])
    canvas.key(
        [(f"patch {patch}", _point(color=_patch_colour(patch), marker=_marker(patch))) for patch in patches]
    )
    return canvas


def draw_compute(subjects: Sequence[Subject]) -> Canvas | None:
    """Draw quality against GMACs and against parameters, with correlations (Figure 8)."""
    if len(subjects[0].finished()) < 2:
        return None
    canvas = Canvas("Quality against compute, and against parameters", 2, len(subjects))
    for row, subject in enumerate(subjects):
        fitted = fit(subject.results, subject.metric, subject.design)
        runs = subject.finished()
        kinds = (
            (GMACS_LABEL, [one.gmacs for one in runs], fitted.correlation),
            ("parameters", [float(one.parameters) for one in runs], fitted.parameters_correlation),
        )
        for column, (label, x, r) in enumerate(kinds):
            axes = canvas.panel(row, column)
            for place, one in zip(x, runs, strict=True):
                axes.scatter(place, subject.value(one), 45, color=_colour(one), marker=_marker(one.patch))
            log_axis(axes, "x", x)
            axes.set_xlabel(label)
            axes.set_ylabel(subject.label)
            axes.set_title(subject.title + ("" if r is None else f"\ncorrelation {r:.2f}"))
    canvas.key(_key([one for subject in subjects for one in subject.finished()], lines=False))
    return canvas


def draw_training_compute(subjects: Sequence[Subject]) -> Canvas | None:
    """Draw quality against total training compute, over training, with the power law (Figure 9)."""
    if not (subjects[0].with_curves() or subjects[0].finished()):
        return None
    canvas = Canvas("Quality against total training compute", len(subjects))
    shown: list[RunResult] = []
    for column, subject in enumerate(subjects):
        axes, runs = canvas.panel(0, column), subject.with_curves() or subject.finished()
        seen: list[tuple[float, float]] = []
        for one in runs:
            curve = [(training_flops(one.gmacs, i), v) for i, v in one.curves.get(subject.metric, ())]
            axes.plot(
                *_columns(curve), linewidth=1, alpha=0.7, color=_colour(one), linestyle=_line(one.patch)
            )
            end = [(one.training_flops, subject.value(one))] if subject.metric in one.metrics else []
            for x, y in end:
                axes.scatter(x, y, 35, color=_colour(one), marker=_marker(one.patch), zorder=3)
            seen += [*curve, *end]
        _draw_law(axes, subject)
        log_axis(axes, "x", [x for x, _ in seen])
        log_axis(axes, "y", [y for _, y in seen])
        axes.set_xlabel("training FLOPs")
        axes.set_ylabel(subject.label)
        shown += runs
    canvas.key(_key(shown, lines=any(one.curves for one in shown)))
    return canvas


def _draw_law(axes: "Axes", subject: Subject) -> None:
    law, runs = fit(subject.results, subject.metric, subject.design).law, subject.finished()
    if law is None:
        axes.set_title(subject.title)
        return
    ends = [min(one.training_flops for one in runs), max(one.training_flops for one in runs)]
    axes.plot(ends, [law(x) for x in ends], color="#666666", linewidth=3, alpha=0.4, zorder=0)
    error = "" if law.exponent_standard_error is None else f" +- {law.exponent_standard_error:.3f}"
    axes.set_title(f"{subject.title}\nexponent {law.exponent:.3f}{error}")


# Curves over training


def draw_conditioning(subjects: Sequence[Subject]) -> Canvas | None:
    """Draw the conditioning designs of each model that has several, over training (Figure 5)."""
    panels = [
        (subject, model)
        for subject in subjects
        for model in _models(subject.results)
        if len(_designs_of(subject, model)) > 1
    ]
    if not panels or panels[0][0] is not subjects[0]:
        return None
    canvas = Canvas("Conditioning designs", len(panels))
    for column, (subject, model) in enumerate(panels):
        axes, runs = canvas.panel(0, column), _designs_of(subject, model)
        for place, one in enumerate(runs):
            index = CONDITIONINGS.index(one.conditioning)
            if curve := one.curves.get(subject.metric):
                axes.plot(*_columns(curve), color=COLOURS[index], linestyle=LINES[index])
            else:
                axes.scatter(place, subject.value(one), 45, color=COLOURS[index], marker=MARKERS[index])
        axes.set_title(model if subject is subjects[0] else f"{subject.title}\n{model} at 400K steps")
        _finish_curves(axes, subject, runs)
        if not any(subject.metric in one.curves for one in runs):
            axes.set_xticks(range(len(runs)), [DESIGNS[one.conditioning] for one in runs], fontsize=7)
            axes.margins(0.15)
    designs = [one for one in CONDITIONINGS if any(run.conditioning == one for run in subjects[0].results)]
    canvas.key([(DESIGNS[one], _design_style(one)) for one in designs])
    return canvas


def _design_style(design: Conditioning) -> dict[str, Any]:
    index = CONDITIONINGS.index(design)
    return {"color": COLOURS[index], "linestyle": LINES[index], "marker": MARKERS[index]}


def draw_training(subjects: Sequence[Subject]) -> Canvas | None:
    """Draw every model over training: by size at equal patch size, by patch size at equal size (Figure 6)."""
    own = subjects[0]
    runs = own.with_curves()
    if not runs:
        return None
    sizes, patches = _sizes(runs), _patches(runs)
    canvas = Canvas("Larger models, and smaller patches, over training", max(len(sizes), len(patches)), 2)
    groups = [
        (0, i, f"patch {patch}", [r for r in runs if r.patch == patch]) for i, patch in enumerate(patches)
    ]
    groups += [(1, i, f"DiT-{size}", [r for r in runs if r.size == size]) for i, size in enumerate(sizes)]
    for row, column, title, group in groups:
        axes = canvas.panel(row, column)
        for one in group:
            axes.plot(*_columns(one.curves[own.metric]), color=_colour(one), linestyle=_line(one.patch))
        axes.set_title(title)
        _finish_curves(axes, own, group)
    canvas.hide_empty()
    canvas.key(_key(runs, lines=True))
    return canvas


def _finish_curves(axes: "Axes", subject: Subject, runs: Sequence[RunResult]) -> None:
    values = [value for one in runs for _, value in one.curves.get(subject.metric, ())]
    if values:
        log_axis(axes, "y", values)
        axes.set_xlabel("images seen")
    axes.set_ylabel(subject.label)


# Sampling


def draw_sampling(subjects: Sequence[Subject]) -> Canvas | None:
    """Draw quality against sampling compute, one curve per model over denoising steps (Figure 10)."""
    own = subjects[0]
    runs = [one for one in own.results if one.conditioning == own.design and len(one.sampling) > 1]
    if own.metric != FRECHET or not runs:
        return None
    canvas = Canvas("Quality against sampling compute", 1)
    axes = canvas.panel(0, 0)
    for one in runs:
        curve = [(score.gflops_per_image, score.frechet_distance) for score in one.sampling]
        style: dict[str, Any] = {"linestyle": _line(one.patch), "marker": _marker(one.patch)}
        axes.plot(*_columns(curve), color=_colour(one), markersize=5, **style)
    scores = [score for one in runs for score in one.sampling]
    log_axis(axes, "x", [score.gflops_per_image for score in scores])
    log_axis(axes, "y", [score.frechet_distance for score in scores])
    axes.set_xlabel("GFLOP per sampled image")
    axes.set_ylabel(own.label)
    canvas.key(_key(runs, lines=True))
    return canvas


FIGURES: dict[str, Callable[[Sequence[Subject]], Canvas | None]] = {
    "figure_02_models": draw_models,
    "figure_05_conditioning": draw_conditioning,
    "figure_06_training": draw_training,
    "figure_08_compute": draw_compute,
    "figure_09_training_compute": draw_training_compute,
    "figure_10_sampling_compute": draw_sampling,
}


def _colour(one: RunResult) -> str:
    """Return the colour of a model size, the same in every figure."""
    return COLOURS[list(SIZES).index(one.size) % len(COLOURS)]


def _patch_colour(patch: int) -> str:
    return COLOURS[patch.bit_length() % len(COLOURS)]


def _marker(patch: int) -> str:
    """Return the marker of a patch size, the same in every figure: 1, 2, 4 and 8 differ."""
    return MARKERS[patch.bit_length() % len(MARKERS)]


def _line(patch: int) -> str:
    return LINES[patch.bit_length() % len(LINES)]


def _point(**properties: Any) -> dict[str, Any]:
    return {"linestyle": "none", **properties}


def _key(runs: Sequence[RunResult], lines: bool) -> list[tuple[str, dict[str, Any]]]:
    """Explain the colour of each size, and the marker and perhaps the line of each patch size."""
    sizes = {one.size: _colour(one) for one in sorted(runs, key=lambda one: list(SIZES).index(one.size))}
    entries = [(f"DiT-{size}", _point(color=colour, marker="s")) for size, colour in sizes.items()]
    for patch in _patches(runs):
        line = _line(patch) if lines else "none"
        style = {"color": "#666666", "linestyle": line, "marker": _marker(patch)}
        entries.append((f"patch {patch}", style))
    return entries


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _sizes(runs: Iterable[RunResult]) -> list[str]:
    present = {one.size for one in runs}
    return [size for size in SIZES if size in present]


def _patches(runs: Iterable[RunResult]) -> list[int]:
    return sorted({one.patch for one in runs}, reverse=True)


def _models(runs: Iterable[RunResult]) -> list[str]:
    return list(dict.fromkeys(one.model for one in runs))


def _designs_of(subject: Subject, model: str) -> list[RunResult]:
    """Return the runs of a model that have the metric, in the order of the designs."""
    chosen = [
        one
        for one in subject.results
        if one.model == model and (subject.metric in one.curves or subject.metric in one.metrics)
    ]
    return sorted(chosen, key=lambda one: CONDITIONINGS.index(one.conditioning))
