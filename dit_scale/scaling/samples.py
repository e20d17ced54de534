"""The samples of a run and their Frechet distance, by the commands `sample` and `evaluate`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dit_scale.errors import DataError
from dit_scale.evaluate.scorecard import CARD, read_card
from dit_scale.scaling.config import StudyConfig, StudyRun

FRECHET_METRICS = ("FID", "FD")
"""Names of the Frechet distance on score cards: with Inception, and with any other network."""


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
    if (folder / CARD).is_file():
        return 0
    sample = ["sample", run.config.run, "--images", str(settings.images), "--sampler", settings.sampler]
    sample += ["--steps", str(steps), "--guidance", f"{settings.guidance:g}", "--seed", str(settings.seed)]
    sample += ["--tile", str(settings.tile), "--device", run.config.engine.device, "--out", str(folder)]
    if code := command(sample):
        return code
    evaluate = ["evaluate", str(folder), "--reference", settings.reference, "--network", settings.network]
    evaluate += ["--vae", run.config.data.vae]  # for a reference that is a latent data set
    return command([*evaluate, "--metrics", "frechet", "--device", run.config.engine.device])


def frechet_of(study: StudyConfig, run: StudyRun, steps: int) -> float | None:
    """Return the Frechet distance of a run's samples; None if they have no score card.

    Raises DataError if the score card is damaged or lacks the distance.
    """
    folder = folder_of(study, run, steps)
    if not (folder / CARD).is_file():
        return None
    results = read_card(str(folder))["results"]
    found = [result["value"] for result in results if result["metric"] in FRECHET_METRICS]
    if not found:
        raise DataError(f"{folder / CARD} has no Frechet distance; remove it to score the samples again")
    return float(found[0])
