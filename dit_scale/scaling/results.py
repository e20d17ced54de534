"""The results of a study, read from its run folders, and what they say together.

A run counts as far as it got: an unfinished run has a curve but no final value.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dit_scale.checkpoint.attempts import committed
from dit_scale.config import ModelConfig
from dit_scale.lines import read_objects
from dit_scale.models.zoo import PAPER_GMACS, Conditioning, num_parameters, shape_of
from dit_scale.scaling import paper
from dit_scale.scaling.config import StudyConfig, StudyRun, runs_of, sampling_gflops, training_flops
from dit_scale.scaling.fits import PowerLaw, correlation, power_law
from dit_scale.scaling.samples import frechet_of
from dit_scale.storage import open_storage
from dit_scale.storage.outputs import new_file
from dit_scale.train import evaluation_keys
from dit_scale.train.evaluation_keys import loss_key
from dit_scale.train.run_folder import METRICS

LOSS, HELD_OUT, WATCHED, FRECHET, FID = "loss", "held_out_loss", "eval_frechet", "frechet_distance", "fid"
"""Metrics: the training loss; held-out loss and Frechet distance by evaluations during training
(`evaluate.every_steps`); the Frechet distance of the study's own samples; the paper's FID."""
TAIL = 0.1
"""The final loss is the mean over the log points in this last part of the run."""
FORMAT, VERSION = "dit-scale scaling results", 1

Curve = tuple[tuple[int, float], ...]
"""Values of a metric by the images seen."""


@dataclass(frozen=True)
class SamplingScore:
    """The score of a run's samples at one number of denoising steps."""

    steps: int
    gflops_per_image: float
    frechet_distance: float


@dataclass(frozen=True)
class RunResult:
    """One run of a study, or one model of the paper."""

    model: str
    conditioning: Conditioning
    parameters: int
    gmacs: float
    images: int
    """Images trained on, counted with repetition."""
    training_flops: float
    finished: bool
    metrics: dict[str, float]
    """Final values by metric."""
    curves: dict[str, Curve] = field(default_factory=dict)
    sampling: tuple[SamplingScore, ...] = ()

    @property
    def size(self) -> str:
        """Model size, for example XL."""
        return self.model.removeprefix("DiT-").partition("/")[0]

    @property
    def patch(self) -> int:
        """Patch size."""
        return int(self.model.partition("/")[2])


@dataclass(frozen=True)
class Fit:
    """How a metric depends on compute, over the finished runs of one conditioning design."""

    metric: str
    conditioning: Conditioning
    law: PowerLaw | None
    """metric = scale * (training FLOPs)^exponent."""
    correlation: float | None
    """Pearson's correlation of log GMACs and the metric."""
    parameters_correlation: float | None
    """The same for log parameters."""


def read_results(study: StudyConfig) -> list[RunResult]:
    """Return the result of every run of a study, in the order of its configuration."""
    return [_result(study, run) for run in runs_of(study)]


def is_trained(run: StudyRun) -> bool:
    """Whether a run has committed its last step."""
    root = open_storage(run.config.checkpoint.url or run.config.run)
    return any(checkpoint.step >= run.config.steps for checkpoint in committed(root))


def _result(study: StudyConfig, run: StudyRun) -> RunResult:
    rows = read_objects(Path(run.config.run) / METRICS, "step")
    images = rows[-1]["step"] * run.config.global_batch if rows else 0
    curves = {metric: _curve(rows, key, run) for metric, key in recorded_keys(run).items()}
    finished = is_trained(run)
    sampling = tuple(_sampling(study, run))
    metrics = {}
    for metric, curve in curves.items():
        if finished and curve:
            metrics[metric] = final_value(curve) if metric == LOSS else curve[-1][1]
    if distance := frechet_of(study, run, study.evaluation.steps):
        metrics[FRECHET] = distance
    return RunResult(
        model=run.shape.name,
        conditioning=run.shape.conditioning,
        parameters=run.parameters,
        gmacs=run.gmacs,
        images=images,
        training_flops=training_flops(run.gmacs, images),
        finished=finished,
        metrics=metrics,
        curves={metric: curve for metric, curve in curves.items() if curve},
        sampling=sampling,
    )


def recorded_keys(run: StudyRun) -> dict[str, str]:
    """Return the key in the record of a run for each metric that is measured during training."""
    held_out = loss_key("loss", f"ema.{run.config.ema[0].name}")
    return {LOSS: "loss", HELD_OUT: held_out, WATCHED: evaluation_keys.FRECHET}


def _curve(rows: Sequence[dict[str, Any]], key: str, run: StudyRun) -> Curve:
    """Return the values of a key by images seen, without those before the first step."""
    found = ((row["step"] * run.config.global_batch, row.get(key)) for row in rows if row["step"])
    return tuple((images, value) for images, value in found if value is not None)


def _sampling(study: StudyConfig, run: StudyRun) -> list[SamplingScore]:
    guided = study.evaluation.guidance != 1
    return [
        SamplingScore(steps, sampling_gflops(run.gmacs, steps, guided), distance)
        for steps in study.evaluation.all_steps
        if (distance := frechet_of(study, run, steps)) is not None
    ]


def final_value(curve: Curve) -> float:
    """Return the mean over the log points in the last tenth of the images, at least one."""
    start = curve[-1][0] * (1 - TAIL)
    last = [value for images, value in curve if images > start]
    return sum(last) / len(last)


def paper_results() -> list[RunResult]:
    """Return the paper's design space: published GMACs and FID-50K, at 256 pixels."""
    images = paper.STEPS * paper.GLOBAL_BATCH
    return [
        RunResult(
            model=model,
            conditioning=conditioning,
            parameters=num_parameters(shape_of(ModelConfig(name=model, conditioning=conditioning))),
            gmacs=PAPER_GMACS[model, paper.IMAGE_SIZE, conditioning],
            images=images,
            training_flops=training_flops(PAPER_GMACS[model, paper.IMAGE_SIZE, conditioning], images),
            finished=True,
            metrics={FID: fid},
        )
        for (model, conditioning), fid in paper.FID.items()
    ]


def metrics_of(results: Sequence[RunResult]) -> list[str]:
    """Return the metrics that any run has, in a fixed order."""
    present = {name for result in results for name in (*result.metrics, *result.curves)}
    return [name for name in (LOSS, HELD_OUT, WATCHED, FRECHET, FID) if name in present]


def fit(results: Sequence[RunResult], metric: str, conditioning: Conditioning) -> Fit:
    """Fit a metric over the finished runs of one conditioning design."""
    chosen = [one for one in results if one.conditioning == conditioning and metric in one.metrics]
    values = [one.metrics[metric] for one in chosen]
    return Fit(
        metric=metric,
        conditioning=conditioning,
        law=power_law([one.training_flops for one in chosen], values),
        correlation=correlation([one.gmacs for one in chosen], values),
        parameters_correlation=correlation([one.parameters for one in chosen], values),
    )


def write_results(path: Path, results: Sequence[RunResult], fits: Sequence[Fit]) -> None:
    """Write results.json."""
    tree: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "runs": [asdict(result) for result in results],
        "fits": [asdict(one) for one in fits],
    }
    with new_file(path) as tmp:
        tmp.write_text(json.dumps(tree, indent=2) + "\n")
