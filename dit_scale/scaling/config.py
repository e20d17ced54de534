"""The configuration of a study, and the training runs that it asks for. Imports no torch."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import Field, field_validator, model_validator

from dit_scale.choices import Method
from dit_scale.config import Folder, ModelConfig, Section, TrainConfig
from dit_scale.errors import ConfigError
from dit_scale.models.zoo import (
    CONDITIONINGS,
    FLOPS_PER_MAC,
    PAPER_NAMES,
    SIZES,
    TRAINING_FORWARDS,
    Conditioning,
    Shape,
    forward_macs,
    num_parameters,
    shape_of,
)


class StudyEvaluation(Section):
    """How the samples of every finished run are scored; without `network` they are not."""

    network: str = ""
    """Feature network, for example inception:FILE, dinov2:FOLDER or classifier:FILE. Empty: none."""
    reference: str = ""
    """Real images or their statistics, as for `dit-scale evaluate --reference`."""
    images: int = Field(10_000, gt=1)
    """Samples of each run."""
    sampler: Method = "ddpm"
    """Sampler, as for `dit-scale sample --sampler`."""
    steps: int = Field(250, gt=0)
    """Denoising steps."""
    sampling_steps: tuple[int, ...] = ()
    """Further numbers of denoising steps, for quality against sampling compute (Figure 10 of the paper)."""
    tile: int = Field(32, gt=0)
    """Images per forward pass, as for `dit-scale sample --tile`."""
    guidance: float = 1.0
    """Guidance scale; 1: none, as in the paper's studies."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Random seed of the samples."""

    @model_validator(mode="after")
    def _network_and_reference(self) -> "StudyEvaluation":
        if bool(self.network) != bool(self.reference):
            raise ValueError("expected both network and reference, or neither")
        return self

    @property
    def all_steps(self) -> tuple[int, ...]:
        """All numbers of denoising steps, ascending; none without a network."""
        return tuple(sorted({self.steps, *self.sampling_steps})) if self.network else ()


class StudyConfig(Section):
    """A study of the design space: one short training run per model and conditioning design."""

    folder: Folder = "runs/scaling"
    """Folder of the study: runs, logs, samples, results and figures."""
    models: tuple[str, ...] = PAPER_NAMES
    """Models, for example DiT-B/4."""
    conditionings: tuple[Conditioning, ...] = ("adaln_zero",)
    """Conditioning designs of every model; the fits use the runs of the first."""
    all_conditionings_of: tuple[str, ...] = ()
    """Models to train with all four conditioning designs (Figure 5 of the paper)."""
    processes: int = Field(1, ge=1)
    """Processes of each run on this machine."""
    train: TrainConfig = TrainConfig()
    """Configuration that all runs share. The study sets run, model.name and model.conditioning."""
    evaluation: StudyEvaluation = StudyEvaluation()

    @field_validator("conditionings", mode="before")
    @classmethod
    def _known_conditionings(cls, names: object) -> object:
        for name in names if isinstance(names, list | tuple) else ():
            if name not in CONDITIONINGS:
                raise ValueError(_unknown("conditioning design", str(name), CONDITIONINGS))
        return names

    @field_validator("models", "all_conditionings_of")
    @classmethod
    def _known_models(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            size, _, patch = name.removeprefix("DiT-").partition("/")
            known = [f"DiT-{one}/{patch if patch.isdecimal() else 2}" for one in SIZES]
            if size not in SIZES or not name.startswith("DiT-"):
                raise ValueError(_unknown("model", name, known))
        return names

    @model_validator(mode="after")
    def _consistent(self) -> "StudyConfig":
        chosen = {"run": self.train, "name": self.train.model, "conditioning": self.train.model}
        given = [key for key, section in chosen.items() if key in section.model_fields_set]
        if given:
            raise ValueError(f"train: the study sets {', '.join(given)} of each run itself; remove it")
        if not self.models or not self.conditionings:
            raise ValueError("expected at least one model and one conditioning design")
        try:
            runs = list(runs_of(self))
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if len({run.name for run in runs}) != len(runs):
            raise ValueError("models and conditionings: expected each name once")
        return self


def _unknown(what: str, name: str, known: tuple[str, ...] | list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"unknown {what} {name!r}; did you mean {near!r}? expected one of {', '.join(known)}"


@dataclass(frozen=True)
class StudyRun:
    """One training run of a study."""

    name: str
    """Name in the file system, for example DiT-B-4-adaln_zero."""
    shape: Shape
    config: TrainConfig

    @property
    def images(self) -> int:
        """Images that the complete run trains on, counted with repetition."""
        return self.config.steps * self.config.global_batch

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return num_parameters(self.shape)

    @property
    def gmacs(self) -> float:
        """Giga-MACs of one forward pass of one image: the paper's "Gflops"."""
        return forward_macs(self.shape) / 1e9

    @property
    def training_flops(self) -> float:
        """Floating-point operations of the complete run."""
        return training_flops(self.gmacs, self.images)


def training_flops(gmacs: float, images: int) -> float:
    """Return the floating-point operations of training on `images` images."""
    return TRAINING_FORWARDS * FLOPS_PER_MAC * gmacs * 1e9 * images


def sampling_gflops(gmacs: float, steps: int, guided: bool) -> float:
    """Return the GFLOP of denoising one image; guidance doubles every step."""
    return FLOPS_PER_MAC * gmacs * steps * (2 if guided else 1)


def runs_of(study: StudyConfig) -> Iterator[StudyRun]:
    """Yield the runs of a study: every model with every design, then the models with all designs.

    Raises ConfigError for an image size that does not fit a model.
    """
    pairs = [(model, design) for model in study.models for design in study.conditionings]
    pairs += [
        (model, design)
        for model in study.all_conditionings_of
        for design in CONDITIONINGS
        if (model, design) not in pairs
    ]
    for model, design in pairs:
        yield _run(study, study.train.model.model_copy(update={"name": model, "conditioning": design}))


def _run(study: StudyConfig, model: ModelConfig) -> StudyRun:
    name = f"{model.name.replace('/', '-')}-{model.conditioning}"
    update: dict[str, object] = {"run": f"{study.folder}/runs/{name}", "model": model}
    if url := study.train.checkpoint.url:
        update["checkpoint"] = study.train.checkpoint.model_copy(update={"url": f"{url}/{name}"})
    return StudyRun(name, shape_of(model), study.train.model_copy(update=update))
