"""What the sections of a configuration are made of, and the section `evaluate`.

`dit_scale.config` has all other sections and the roots.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dit_scale.choices import Method
from dit_scale.paths import PathKind

Folder = Annotated[str, PathKind.FOLDER]
File = Annotated[str, PathKind.FILE]
NodeFolder = Annotated[str, PathKind.CACHE]
FolderOrUrl = Annotated[str, PathKind.STORAGE]
FolderOrHubName = Annotated[str, PathKind.VAE]
NetworkSpec = Annotated[str, PathKind.NETWORK]


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class EvaluateConfig(Section):
    """Quality while training: samples, held-out loss, Frechet distance (docs/evaluation.md)."""

    every_steps: int = Field(0, ge=0)
    """Evaluation interval in steps, also before the first step and after the last; 0: never."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Random seed of the held-out samples, their draws, and the sampled images; independent of `seed`."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Fraction of the data set that training never reads, for the held-out loss; 0: none."""
    grid_images: int = Field(16, ge=0, le=100)
    """Images in the grid of each evaluation; 0: no grid."""
    images: int = Field(0, ge=0)
    """Images for the Frechet distance; 0: no distance."""
    network: NetworkSpec = ""
    """Feature network of the Frechet distance as KIND:PATH, for example inception:FILE.pth."""
    reference: File = ""
    """Statistics to compare with, an npz file by `dit-scale evaluate --make-reference`."""
    sampler: Method = "dpmpp_2m"
    """Sampler of grid and Frechet distance: ddpm, ddim, dpmpp_2m, dpmpp_2m_sde or unipc."""
    sampling_steps: int = Field(20, ge=2)
    """Denoising steps of an image."""
    guidance: float = Field(1.0, ge=0)
    """Classifier-free guidance scale; 1: no guidance, which halves the cost."""
    tile: int = Field(32, gt=0)
    """Samples in a forward pass; affects the last bits of the results."""

    @model_validator(mode="after")
    def _complete(self) -> "EvaluateConfig":
        if self.every_steps and not (self.held_out or self.grid_images or self.images):
            raise ValueError(
                "every_steps is set, but held_out, grid_images and images are all 0: nothing to evaluate"
            )
        if self.images == 1:
            raise ValueError(
                "images=1 has no covariance: expected 0, or 2 or more images for a Frechet distance"
            )
        if self.images and not (self.network and self.reference):
            raise ValueError(
                f"images={self.images} asks for a Frechet distance: set network and reference as well"
            )
        return self
