"""The samples of a run and their score, by the commands `sample` and `evaluate`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit_scale.scaling.config import StudyConfig, StudyRun

SCORE = "metrics.json"
FRECHET = "frechet_distance"


def folder_of(study: StudyConfig, run: StudyRun, steps: int) -> Path:
    """Return the folder of the samples that a run made in this number of denoising steps."""
    return Path(study.folder) / "samples" / run.name / f"{steps}-steps"


def score_samples(
    study: StudyConfig, run: StudyRun, steps: int, command: Callable[[Sequence[str]], int]
) -> int:
    """Sample from a trained run and score the samples, unless that is done. Return the last exit code.

    `command` runs `dit-scale` with these arguments.
    """
    folder, settings = folder_of(study, run, steps), study.evaluation
    if (folder / SCORE).is_file():
        return 0
    sample = ["sample", run.config.run, "--images", str(settings.images), "--sampler", settings.sampler]
    sample += ["--steps", str(steps), "--guidance", f"{settings.guidance:g}", "--seed", str(settings.seed)]
    sample += ["--out", str(folder)]
    if code := command(sample):
        return code
    evaluate = ["evaluate", str(folder / "samples.npz"), "--reference", settings.reference]
    return command([*evaluate, "--network", settings.network, "--out", str(folder / SCORE)])


def frechet_of(study: StudyConfig, run: StudyRun, steps: int) -> float | None:
    """Return the Frechet distance of a run's samples; None if they have no score."""
    path = folder_of(study, run, steps) / SCORE
    if not path.is_file():
        return None
    tree: dict[str, Any] = json.loads(path.read_text())
    return float(tree[FRECHET])
