"""What the sections of a configuration are made of, and the sections `engine` and `evaluate`.

`dit_scale.config` has all other sections and the roots.
"""

from typing import Annotated, Literal

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


class EngineConfig(Section):
    """How a training step runs: parallelism, precision, devices."""

    zero_stage: Literal[1, 2, 3] = 2
    """ZeRO stage: 1 shards optimizer state, 2 also gradients, 3 also weights."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of weights and activations; master weights, moments, EMA and gradient sums are always fp32. `auto`
    keeps the run's precision; a new run uses bf16 if the hardware supports it, else fp32."""
    micro_batch: int = Field(32, gt=0)
    """Maximum samples per process and forward pass; gradient accumulation reaches the global batch."""
    memory_gib: float = Field(0.0, ge=0)
    """Memory budget per device in GiB; the micro-batch shrinks until a step fits. 0: no limit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; `auto`: CUDA if available."""
    compile_blocks: bool = False
    """Compile the transformer blocks and the loss with torch.compile; all blocks share one compilation."""
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """Save memory by recomputing activations in the backward pass: `block`: all but the input of a block;
    `selective`: all but the results of matrix products and attention. Losses keep their bits."""
    determinism: Literal["strict", "fast"] = "strict"
    """`strict`: bitwise reproducible at the same world size; `fast`: reproducible up to rounding."""
    cpu_threads: int = Field(1, ge=1)
    """Threads per process on a CPU; `strict` reproduces only with the same number."""
    reduce_bucket_elements: int = Field(50_000_000, gt=0)
    """Gradient elements per reduction bucket."""
    overlap_comm: bool = True
    """Overlap gradient reduction with the backward pass."""

    @model_validator(mode="after")
    def _stage_3_gathers_in_hooks(self) -> "EngineConfig":
        if self.compile_blocks and self.zero_stage == 3:
            raise ValueError(
                "compile_blocks=true with zero_stage=3 is slower than without compilation, because the hooks "
                "that gather weights recompile repeatedly; use zero_stage 1 or 2, or compile_blocks=false"
            )
        if self.activation_checkpointing == "selective" and self.zero_stage == 3:
            raise ValueError(
                "activation_checkpointing=selective with zero_stage=3 cannot run, because the hooks that "
                "gather weights differ when repeated; use activation_checkpointing=block, or zero_stage 1 "
                "or 2"
            )
        return self


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
