"""Every knob, typed and frozen, in one file that imports no torch.

Two roots: `TrainConfig` (a training run) and `EncodeConfig` (an encoding job). `load` reads
defaults -> YAML -> `key=value` overrides (`configfile`), and makes all paths absolute (`paths`).
A component is handed its own section, never the root.
"""

import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dit_scale import configfile, recipes
from dit_scale.errors import ConfigError
from dit_scale.paths import PathKind, with_absolute_paths

Decay = Annotated[float, Field(ge=0, lt=1)]
Folder = Annotated[str, PathKind.FOLDER]
NodeFolder = Annotated[str, PathKind.CACHE]
FolderOrUrl = Annotated[str, PathKind.STORAGE]
FolderOrHubName = Annotated[str, PathKind.VAE]


class Section(BaseModel):
    """A frozen group of knobs; the docstring under a field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    """Which transformer of the paper's Table 4, and how it is conditioned."""

    name: str = "DiT-XL/2"
    """Row and patch size: DiT-{S,B,L,XL}/{2,4,8}; DiT-Ti is small, for laptops, DiT-Nano for tests."""
    image_size: int = Field(256, gt=0)
    """Side of the square image in pixels; a multiple of 8 x patch (the VAE divides it by 8)."""
    conditioning: Literal["adaln_zero", "adaln", "cross_attention", "in_context"] = "adaln_zero"
    """How timestep and class enter the blocks (Section 3.2 of the paper)."""
    num_classes: int = Field(1000, gt=0)
    """Real classes; one more row of the label table stands for "no class"."""
    attention: str = "sdpa"
    """Attention backend; `dit_scale.models.attention.BACKENDS` has the names."""


class DataConfig(Section):
    """Where the latents are and how they are read."""

    url: FolderOrUrl = "data/imagenet256"
    """Folder or s3:// prefix of a latent data set (docs/formats.md)."""
    vae: FolderOrHubName = "stabilityai/sd-vae-ft-ema"
    """Folder or hub name of the AutoencoderKL that made the latents; needed only to look at samples."""
    horizontal_flip: bool = True
    """Draw the mirrored view half of the time (both views are stored encoded)."""
    cache_dir: NodeFolder = "~/.cache/dit_scale/shards"
    """Folder on the node's own disk that keeps shards of a remote data set."""
    cache_bytes: int = Field(0, ge=0)
    """Most bytes that shards may take in `cache_dir`; 0 sets no limit."""
    window_shards: int = Field(0, ge=0)
    """Shards whose samples are mixed at a time, for caches smaller than the data set; 0 mixes all of it."""
    prefetch_batches: int = Field(4, ge=1)
    """Micro-batches read ahead of the training step."""
    deadline_s: float = Field(300.0, gt=0, lt=600)
    """Longest wait for a micro-batch; then the process stops, before its peers give up on it (600 s)."""
    damaged: Literal["stop", "quarantine"] = "stop"
    """What to do about a sample whose checksum stays wrong: stop, or replace it and write it down."""


class DiffusionConfig(Section):
    """The Gaussian diffusion of the paper (Section 3.1, after ADM)."""

    timesteps: int = Field(1000, gt=20)
    """Length of the linear schedule, betas 1e-4 to 2e-2 at 1000."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Share of samples that train without their class, for classifier-free guidance."""


class OptimizerConfig(Section):
    """AdamW as the paper has it: constant rate, no warm-up, no weight decay, no clipping."""

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up; 0 starts at `lr`."""
    decay: Literal["none", "cosine", "linear"] = "none"
    """How the learning rate falls from the end of the warm-up to the last step (docs/diffusion.md)."""
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Learning rate of the last step, as a fraction of `lr`; needs a `decay`."""
    clip_grad_norm: float = Field(0.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    implementation: Literal["torch", "apex", "deepspeed"] = "torch"
    """Whose AdamW: torch (fused on CUDA), apex FusedAdam or DeepSpeed FusedAdam (both need CUDA)."""

    @model_validator(mode="after")
    def _final_rate_needs_a_decay(self) -> "OptimizerConfig":
        if self.final_lr_fraction and self.decay == "none":
            raise ValueError(
                f"final_lr_fraction={self.final_lr_fraction:g} with decay=none has no effect; "
                "set decay=cosine or decay=linear"
            )
        return self


class EngineConfig(Section):
    """How the step runs on machines."""

    zero_stage: Literal[1, 2, 3] = 2
    """ZeRO stage: 1 shards optimizer state, 2 also gradients, 3 also weights."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of weights and activations; masters, moments, EMA and gradient sums are always fp32. `auto`: what
    the run began with; a new run takes bf16 where the device multiplies it in hardware, else fp32."""
    micro_batch: int = Field(32, gt=0)
    """Most samples per process in one forward pass; the global batch is reached by accumulation."""
    memory_gib: float = Field(0.0, ge=0)
    """Memory of a device to plan for: the micro-batch shrinks until it fits; 0 does not look at it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; `auto` takes CUDA when there is one."""
    compile_blocks: bool = False
    """torch.compile each transformer block (one compilation, reused by all blocks)."""
    determinism: Literal["strict", "fast"] = "strict"
    """`strict`: bitwise the same at the same world size; `fast`: the same samples and draws to rounding."""
    cpu_threads: int = Field(1, ge=1)
    """Threads of each process on a CPU; part of what `strict` pins."""
    reduce_bucket_elements: int = Field(50_000_000, gt=0)
    """Gradient elements reduced at once."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on."""

    @model_validator(mode="after")
    def _compile_without_hooks(self) -> "EngineConfig":
        if self.compile_blocks and self.zero_stage == 3:
            raise ValueError(
                "compile_blocks=true with zero_stage=3 is slower than without: the hooks that gather "
                "weights are compiled and compiled again; use stage 1 or 2, or compile_blocks=false"
            )
        return self


class EmaProfile(Section):
    """One moving average of the fp32 master weights; give `decay` or `sigma_rel`, not both."""

    name: str
    """Name in checkpoints and on the command line."""
    decay: float | None = Field(None, gt=0, lt=1)
    """Constant decay per step (the paper: 0.9999)."""
    sigma_rel: float | None = Field(None, gt=0, lt=0.289)
    """Relative width of a power-function profile (Karras et al. 2024, Section 3)."""

    @model_validator(mode="after")
    def _one_kind(self) -> "EmaProfile":
        if (self.decay is None) == (self.sigma_rel is None):
            raise ValueError(f"profile {self.name!r}: give either decay or sigma_rel")
        return self


class CheckpointConfig(Section):
    """When the run is saved, where, and what is kept."""

    url: FolderOrUrl = ""
    """Folder or s3:// prefix of checkpoints and attempts, the same on all nodes; empty: the run's folder."""
    every_steps: int = Field(5000, gt=0)
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that stay."""
    keep_every_steps: int = Field(0, ge=0)
    """Of every so many steps the first checkpoint stays for good; 0 keeps none so."""
    ema_every_steps: int = Field(0, ge=0)
    """Steps between stored power-function averages, for `dit-scale ema reconstruct`; 0 stores none."""
    deadline_s: float = Field(1800.0, gt=0)
    """A save that takes longer has failed; the last one is waited for this long."""


class GuardConfig(Section):
    """What happens to a step whose loss or gradient cannot be right (docs/determinism.md)."""

    spike_factor: float = Field(0.0, ge=0)
    """A loss or gradient norm this many times its running mean is a failure; 0: only non-finite ones."""
    horizon_steps: int = Field(100, ge=1)
    """Steps over which the running means reach back; as many pass before spikes are judged."""
    rollback_after: int = Field(10, ge=1)
    """Failed steps in a row after which the run goes back to a checkpoint and leaves their samples out."""
    max_rollbacks: int = Field(3, ge=0)
    """Rollbacks without a newer checkpoint before the run gives up."""


class Mirrored(Section):
    """Metrics that Weights & Biases may mirror."""

    wandb: Literal["off", "online", "offline"] = "off"
    """Mirror to Weights & Biases."""
    wandb_project: str = "dit-scale"
    """Project of the mirror."""


class LogConfig(Mirrored):
    """What is written down; metrics.jsonl is the record, the others mirror it."""

    every_steps: int = Field(100, gt=0)
    """Steps between two log points; nothing is read from the device in between."""
    tensorboard: bool = False
    """Mirror to TensorBoard files in the run's folder."""


class TrainConfig(Section):
    """One training run."""

    run: Folder = "runs/dit_xl2_256"
    """The run's folder: config, metrics, events, checkpoints, samples."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Key of every draw and of the order of samples."""
    steps: int = Field(400_000, gt=0)
    """Optimizer steps."""
    global_batch: int = Field(256, gt=0, lt=2**31)
    """Samples per optimizer step over all processes."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    ema: tuple[EmaProfile, ...] = (EmaProfile(name="paper", decay=0.9999),)
    """Moving averages kept beside the weights; the first is what samples use unless told otherwise."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _ema_names_differ(self) -> "TrainConfig":
        names = [profile.name for profile in self.ema]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"ema: expected one or more profiles with different names, got {names}")
        return self


class EncodeConfig(Mirrored):
    """One encoding job: images in, a latent data set out."""

    source: FolderOrUrl = "data/imagenet/train"
    """Folder or s3:// prefix that every node sees, with one sub-folder of images per class, with class
    tars, WebDataset tars or Parquet files; ILSVRC2012_img_train.tar itself; a pattern, DIR/train-*.tar."""
    image_column: str = "image"
    """Of Parquet files: the column of the images, structs with `bytes`. Other sources have no columns."""
    label_column: str = "label"
    """Of Parquet files: the column of the labels, integers from 0 on."""
    allow_empty_classes: bool = False
    """Whether classes may be without an image, as in a part of a data set; they keep their labels."""
    output: FolderOrUrl = "data/imagenet256"
    """Folder or s3:// prefix that becomes the latent data set; every node must see it."""
    vae: FolderOrHubName = "stabilityai/sd-vae-ft-ema"
    """Folder or hub name of the AutoencoderKL (safetensors only)."""
    image_size: int = Field(256, gt=0, multiple_of=8)
    """Side of the square crop in pixels."""
    shard_samples: int = Field(4096, gt=0)
    """Images of the listing per shard."""
    vae_batch: int = Field(32, gt=0)
    """Images per VAE pass; part of what a shard's bytes depend on."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Arithmetic of the VAE; latents are stored as fp16 either way. `auto`: what the output was begun with; a
    new one takes bf16 where the encoders multiply it in hardware, else fp32."""
    channels_last: bool = False
    """Layout of the VAE's tensors: faster in bf16 on a GPU; part of what a shard's bytes depend on."""
    compile: bool = False
    """Compile the VAE's encoder; part of what a shard's bytes depend on."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the VAE runs; `auto` takes CUDA when there is one."""
    nodes: int = Field(1, ge=1)
    """Ray nodes to wait for before encoders are placed."""
    wait_s: float = Field(600.0, ge=0)
    """Time in which those nodes must come."""
    encoders: int = Field(0, ge=0)
    """Ray actors that hold a VAE; 0: as many as the nodes have room for."""
    cpus_per_encoder: float = Field(1.0, gt=0)
    """CPUs that Ray reserves for an encoder; a fraction leaves room for decoders on a small machine."""
    gpus_per_encoder: float = Field(1.0, ge=0)
    """GPUs that Ray reserves for an encoder when `device` is cuda."""
    threads_per_encoder: int = Field(1, ge=1)
    """Threads of the VAE on a CPU; part of what a shard's bytes depend on."""
    decoders: int = Field(0, ge=0)
    """Ray tasks that decode and crop images at once (one core: about 220 images/s of ImageNet); 0: as
    many as the nodes have room for beside the encoders and one task that writes."""
    cpus_per_decoder: float = Field(0.5, gt=0)
    """CPUs that Ray reserves for a task that decodes, or writes a shard."""
    max_quarantined: float = Field(0.001, ge=0, le=1)
    """Largest share of inputs that may be unreadable before the job fails."""
    ray_address: str = "auto"
    """`auto` joins the cluster that RAY_ADDRESS names, else starts a local one (`local`); or host:port."""
    log_every_s: float = Field(15.0, gt=0)
    """Time between two rows of metrics.jsonl in the output."""


RootConfig = TypeVar("RootConfig", TrainConfig, EncodeConfig)


def load(
    root: type[RootConfig],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    keep_relative: bool = False,
) -> RootConfig:
    """Read a configuration: defaults, then the YAML file or recipe, then `key=value` overrides.

    Paths come back absolute; with `keep_relative`, relative ones stay as they are. Raises ConfigError for a
    missing file or recipe, bad YAML, an unknown key (naming the nearest one), a value of the wrong kind or an
    empty path.
    """
    tree = configfile.read_file(recipes.find(path)) if path is not None else {}
    given = [configfile.read_override(text) for text in overrides]
    for override in given:
        configfile.put(root, tree, override)
    try:
        config = root.model_validate(configfile.typed(root, tree))
    except ValidationError as error:
        raise ConfigError(configfile.explain(root, error, path, given)) from None
    return with_absolute_paths(
        config, keep_relative, lambda key: configfile.blamed(key.split("."), path, given)
    )


def load_for_training(path: str | Path, overrides: Sequence[str]) -> TrainConfig:
    """The configuration for a start of its run.

    Raises ConfigError like `load`, and for the config.yaml of a run that has moved: unless the command line
    says where it is, it would begin anew in the old place.
    """
    config, folder = load(TrainConfig, path, overrides), Path(os.path.abspath(path)).parent
    if Path(path).name != "config.yaml" or not (folder / "events.jsonl").is_file():
        return config
    saved = load(TrainConfig, path)
    if _is_folder(saved.run, folder):
        return config
    if not any(text.partition("=")[0].strip() == "run" for text in overrides):
        raise ConfigError(
            f"{path} is of a run that was in {saved.run}: run={folder} goes on with it here, any other "
            "run=FOLDER begins a new one"
        )
    is_as_saved = config.checkpoint.url == saved.checkpoint.url
    return (
        relocated(config, config.run, saved.run) if is_as_saved and _is_folder(config.run, folder) else config
    )


def _is_folder(path: str, folder: Path) -> bool:
    return os.path.isdir(path) and folder.samefile(path)


def relocated(config: TrainConfig, folder: str, old: str | None = None) -> TrainConfig:
    """The configuration of a run that was found in this folder, wherever it was when it was saved.

    Checkpoints below the run's folder, `old` (None: as configured), have moved with it.
    """
    old, new = old or config.run, os.path.abspath(folder)
    url = config.checkpoint.url
    if url == old or url.startswith(f"{old}/"):
        url = new + url.removeprefix(old)
    checkpoint = config.checkpoint.model_copy(update={"url": url})
    return config.model_copy(update={"run": new, "checkpoint": checkpoint})


def dump(config: Section) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
