"""Figures of a study: each one appears exactly if the runs have its data, as PNG and SVG."""

from pathlib import Path

import pytest

from dit_scale.scaling import canvas
from dit_scale.scaling.figures import FIGURES, Subject, draw_all
from dit_scale.scaling.results import (
    FID,
    FRECHET,
    LOSS,
    RunResult,
    SamplingScore,
    metrics_of,
    paper_results,
)

WITHOUT_CURVES = (
    "figure_02_models",
    "figure_05_conditioning",
    "figure_08_compute",
    "figure_09_training_compute",
)


def study(scored: bool) -> list[RunResult]:
    """Return four models and a second design of one of them, after 1,000 images."""
    pairs = [(f"DiT-{size}/{patch}", "adaln_zero") for size in ("Ti", "S") for patch in (4, 2)]
    return [
        RunResult(
            model=model,
            conditioning=design,  # type: ignore[arg-type]
            parameters=1000 * (1 + index // 2),
            gmacs=float(1 + index),
            images=1000,
            training_flops=6e12 * (1 + index),
            finished=True,
            metrics={LOSS: 0.3 / (1 + index)} | ({FRECHET: 10.0 - index} if scored else {}),
            curves={LOSS: tuple((images, 1 / (images + index)) for images in range(100, 1001, 100))},
            sampling=tuple(SamplingScore(n, 2.0 * n, 100.0 / n) for n in (10, 50)) if scored else (),
        )
        for index, (model, design) in enumerate([*pairs, ("DiT-S/2", "adaln")])
    ]


def drawn(*subjects: Subject) -> set[str]:
    """Return the names of the figures for which there is data. Saving them all would take seconds."""
    with canvas.style():
        return {name for name, draw in FIGURES.items() if draw(subjects) is not None}


def subject(results: list[RunResult], metric: str) -> Subject:
    return Subject("title", results, metric, "adaln_zero")


PAPER = subject(paper_results(), FID)


def test_losses_give_every_figure_except_that_of_sampling() -> None:
    own = subject(study(scored=False), LOSS)
    assert drawn(own, PAPER) == set(FIGURES) - {"figure_10_sampling_compute"}


def test_scores_give_the_figure_of_sampling_too() -> None:
    results = study(scored=True)
    assert metrics_of(results) == [LOSS, FRECHET]
    assert drawn(subject(results, FRECHET), PAPER) == {*WITHOUT_CURVES, "figure_10_sampling_compute"}


def test_the_papers_figures() -> None:
    assert drawn(PAPER) == set(WITHOUT_CURVES)


def test_figures_are_png_and_svg_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        with canvas.style():
            made = FIGURES["figure_08_compute"]([PAPER])
            assert made is not None
            made.save(tmp_path / folder / "figure")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert files["figure.png"].startswith(b"\x89PNG\r\n\x1a\n")
    assert b"correlation -0.93" in files["figure.svg"]
    assert set(files) == {"figure.png", "figure.svg"}


def test_runs_without_any_value_give_no_figure(tmp_path: Path) -> None:
    bare = [
        RunResult(
            model="DiT-S/2",
            conditioning="adaln_zero",
            parameters=1,
            gmacs=1.0,
            images=0,
            training_flops=0.0,
            finished=False,
            metrics={},
        )
    ]
    assert metrics_of(bare) == []
    assert draw_all(bare, [LOSS], "adaln_zero", tmp_path) == []


@pytest.mark.parametrize(
    "values", [[0.1, 0.3], [1.0, 40.0], [1.0, 150.0], [3e7, 6e8], [1e10, 1e20], [0.7, 0.7]]
)
def test_a_logarithmic_axis_has_a_few_labels(values: list[float]) -> None:
    with canvas.style():
        made = canvas.Canvas("title", 1)
        axes = made.panel(0, 0)
        axes.plot(values, values)
        canvas.log_axis(axes, "x", values)
        low, high = axes.get_xlim()
        shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert 1 <= len(shown) <= 12
