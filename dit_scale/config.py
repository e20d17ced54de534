"""The configuration: every key, typed and frozen, without torch.

The sections `engine` and `evaluate` are in `sections`. There are two roots: `TrainConfig` for a training run
and `EncodeConfig` for an encoding job. A study of many runs has a third, `StudyConfig` in
`dit_scale.scaling.config`. `load` reads defaults -> YAML -> `key=value` overrides (`configfile`) and makes
all paths absolute (`paths`). A component receives its own section, never the root. The docstring under a
field is the help text that `dit-scale config` prints.
"""

import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from dit_scale import configfile, recipes
from dit_scale.choices import attention_problem
from dit_scale.errors import ConfigError
from dit_scale.paths import with_absolute_paths
from dit_scale.sections import EngineConfig as EngineConfig
from dit_scale.sections import EvaluateConfig, Folder, FolderOrHubName, FolderOrUrl, NodeFolder
from dit_scale.sections import Section as Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Section):
    """The transformer (Table 4 of the paper) and its conditioning."""

    name: str = "DiT-XL/2"
    """Model size and patch size: DiT-{S,B,L,XL}/{2,4,8}. DiT-Ti is for laptops, DiT-Nano for tests."""
    image_size: int = Field(256, gt=0)
    """Image side in pixels; a multiple of 8 x patch size, because the VAE downsamples by 8."""
    conditioning: Literal["adaln_zero", "adaln", "cross_attention", "in_context"] = "adaln_zero"
    """How timestep and class condition the blocks (Section 3.2 of the paper)."""
    num_classes: int = Field(1000, gt=0)
    """Number of classes, not counting the null class."""
    timestep_embedding: Literal["paper", "diffusers"] = "paper"
    """Frequencies of the timestep sinusoid: 10000**(-i / 128), as in the paper's code, or 10000**(-i / 127),
    as in diffusers. Only a model trained with `diffusers` is the same function in a diffusers pipeline."""
    attention: str = "sdpa"
    """Attention backend: sdpa (torch picks a kernel), sdpa_{flash,efficient,cudnn,math} or flash{2,3,4}."""


class DataConfig(Section):
    """The latent data set and how to read it."""

    url: FolderOrUrl = "data/imagenet256"
    """Folder or s3:// prefix of the latent data set (docs/formats.md)."""
    vae: FolderOrHubName = "stabilityai/sd-vae-ft-ema"
    """Folder or hub name of the AutoencoderKL that made the latents; only sampling needs it."""
    horizontal_flip: bool = True
    """Train on the flipped view half of the time; the data set stores both views."""
    cache_dir: NodeFolder = "~/.cache/dit_scale/shards"
    """Folder on the node's local disk that caches shards of a remote data set."""
    cache_bytes: int = Field(0, ge=0)
    """Size limit of the shard cache in bytes; 0: no limit."""
    window_shards: int = Field(0, ge=0)
    """Shuffle this many shards at a time, for a cache smaller than the data set; 0: shuffle all samples."""
    prefetch_batches: int = Field(4, ge=1)
    """Number of micro-batches to prefetch."""
    deadline_s: float = Field(300.0, gt=0, lt=600)
    """Seconds to wait for a micro-batch before the process exits; below its peers' timeout of 600 s."""
    damaged: Literal["stop", "quarantine"] = "stop"
    """On a sample whose checksum stays wrong: stop the run, or replace the sample and record it."""


class DiffusionConfig(Section):
    """The Gaussian diffusion (Section 3.1 of the paper, following ADM)."""

    timesteps: int = Field(1000, gt=20)
    """Diffusion steps in training. At 1000, betas rise linearly from 1e-4 to 2e-2."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Probability of replacing a label with the null class, for classifier-free guidance."""


class OptimizerConfig(Section):
    """AdamW. Defaults are the paper's: constant learning rate, no warm-up, weight decay or clipping."""

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """Term added to the denominator for numerical stability."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay coefficient."""
    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up in steps; 0: start at the peak learning rate."""
    decay: Literal["none", "cosine", "linear"] = "none"
    """Learning rate decay from the end of warm-up to the last step (docs/diffusion.md)."""
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Final learning rate as a fraction of the peak; requires a decay."""
    clip_grad_norm: float = Field(0.0, ge=0)
    """Clip gradients to this global L2 norm; 0: no clipping."""
    implementation: Literal["torch", "triton", "apex", "deepspeed"] = "torch"
    """AdamW implementation: torch (fused on CUDA), or with CUDA: triton (updates the first EMA profile in the
    same pass), or FusedAdam of apex or DeepSpeed."""

    @model_validator(mode="after")
    def _final_rate_needs_a_decay(self) -> "OptimizerConfig":
        if self.final_lr_fraction and self.decay == "none":
            raise ValueError(
                f"final_lr_fraction={self.final_lr_fraction:g} has no effect with decay=none; "
                "set decay=cosine or decay=linear"
            )
        return self


class EmaProfile(Section):
    """A moving average of the fp32 master weights, with either `decay` or `sigma_rel`."""

    name: str
    """Profile name, in checkpoints, file names and on the command line."""
    decay: float | None = Field(None, gt=0, lt=1)
    """Constant decay per step; 0.9999 in the paper."""
    sigma_rel: float | None = Field(None, gt=0, lt=0.289)
    """Relative width of a power-function profile (Karras et al. 2024, Section 3)."""

    @model_validator(mode="after")
    def _one_kind(self) -> "EmaProfile":
        if (self.decay is None) == (self.sigma_rel is None):
            raise ValueError(f"profile {self.name!r}: expected either decay or sigma_rel")
        return self


class CheckpointConfig(Section):
    """When and where to save checkpoints, and which to keep."""

    url: FolderOrUrl = ""
    """State root: folder or s3:// prefix for checkpoints and attempts, shared by all nodes. Empty: `run`."""
    every_steps: int = Field(5000, gt=0)
    """Checkpoint interval in steps; the last step is always saved."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    keep_every_steps: int = Field(0, ge=0)
    """Keep the first checkpoint of every N-step window permanently; 0: disabled."""
    keep_best: bool = False
    """Save at every evaluation, and keep the checkpoint with the best one."""
    ema_every_steps: int = Field(0, ge=0)
    """Store power-function averages every N steps, for `dit-scale ema reconstruct`; 0: disabled."""
    deadline_s: float = Field(1800.0, gt=0)
    """Deadline for a save in seconds; a save that misses it has failed."""


class GuardConfig(Section):
    """What to do when a loss or gradient is not finite or spikes (docs/determinism.md)."""

    spike_factor: float = Field(0.0, ge=0)
    """Skip a step whose loss or gradient norm exceeds N times its running mean; 0: only if not finite."""
    horizon_steps: int = Field(100, ge=1)
    """Horizon of the running means in steps; spikes are detected only after this many steps."""
    rollback_after: int = Field(10, ge=1)
    """Consecutive skipped steps before a rollback, which also excludes their samples."""
    max_rollbacks: int = Field(3, ge=0)
    """Rollbacks without a new checkpoint in between before the run stops."""


class Mirrored(Section):
    """Mirroring of metrics to Weights & Biases."""

    wandb: Literal["off", "online", "offline"] = "off"
    """Mirror metrics to Weights & Biases."""
    wandb_project: str = "dit-scale"
    """Weights & Biases project."""


class LogConfig(Mirrored):
    """Metrics. metrics.jsonl is the record; Weights & Biases, TensorBoard and Trackio mirror it."""

    every_steps: int = Field(100, gt=0)
    """Logging interval in steps; between log points the host never waits for metrics."""
    tensorboard: bool = False
    """Mirror metrics to TensorBoard files in the run folder."""
    trackio: bool = False
    """Mirror metrics to a Trackio database in the run folder, or in TRACKIO_DIR if that is set."""
    trackio_project: str = "dit-scale"
    """Trackio project."""
    peak_tflops: float = Field(0.0, ge=0)
    """TFLOP/s of a device to which `mfu` is relative, in the type of the weights; 0: measure a matrix
    product at each start."""


class TrainConfig(Section):
    """A training run."""

    run: Folder = "runs/dit_xl2_256"
    """Run folder: config.yaml, metrics, journal, checkpoints, samples."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Random seed of weights, draws and sample order."""
    steps: int = Field(400_000, gt=0)
    """Total number of optimizer steps."""
    global_batch: int = Field(256, gt=0, lt=2**31)
    """Samples per optimizer step, over all processes."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    ema: tuple[EmaProfile, ...] = (EmaProfile(name="paper", decay=0.9999),)
    """Moving averages of the weights; sampling uses the first by default."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _ema_names_differ(self) -> "TrainConfig":
        names = [profile.name for profile in self.ema]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"ema: expected one or more profiles with different names, got {names}")
        return self

    @model_validator(mode="after")
    def _attention_can_run(self) -> "TrainConfig":
        engine = self.engine
        problem = attention_problem(self.model.attention, engine.precision, engine.determinism, engine.device)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _best_by_a_number(self) -> "TrainConfig":
        evaluate = self.evaluate
        if self.checkpoint.keep_best and not (
            evaluate.every_steps and (evaluate.images or evaluate.held_out)
        ):
            raise ValueError(
                "checkpoint.keep_best=true needs evaluations to compare: set evaluate.every_steps, and "
                "evaluate.held_out or evaluate.images"
            )
        return self


class EncodeConfig(Mirrored):
    """An encoding job: images to a latent data set."""

    source: FolderOrUrl = "data/imagenet/train"
    """Images: a folder or s3:// prefix with class folders, class tars, WebDataset tars or Parquet files, a
    pattern such as DIR/train-*.tar, or ILSVRC2012_img_train.tar. Every node must be able to read it."""
    image_column: str = "image"
    """Parquet only: image column, with structs that have a `bytes` field."""
    label_column: str = "label"
    """Parquet only: label column, with integers from 0."""
    allow_empty_classes: bool = False
    """Allow classes without images, as in a subset of a data set; labels do not change."""
    output: FolderOrUrl = "data/imagenet256"
    """Output folder or s3:// prefix of the latent data set. Every node must be able to write it."""
    vae: FolderOrHubName = "stabilityai/sd-vae-ft-ema"
    """Folder or hub name of the AutoencoderKL, as safetensors."""
    image_size: int = Field(256, gt=0, multiple_of=8)
    """Crop side in pixels."""
    shard_samples: int = Field(4096, gt=0)
    """Input images per shard."""
    vae_batch: int = Field(32, gt=0)
    """Images per VAE pass; affects the last bits of latents."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Precision of the VAE; latents are always stored as fp16. `auto` keeps the output's precision; a new
    output uses bf16 if the encoders' hardware supports it, else fp32."""
    channels_last: bool = False
    """Use channels-last tensors in the VAE: faster in bf16 on a GPU; affects the last bits of latents."""
    compile: bool = False
    """Compile the VAE encoder with torch.compile; affects the last bits of latents."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the VAE; `auto`: CUDA if available."""
    nodes: int = Field(1, ge=1)
    """Number of Ray nodes to wait for before placing encoders."""
    wait_s: float = Field(600.0, ge=0)
    """Seconds to wait for the nodes, and then for the first encoder."""
    encoders: int = Field(0, ge=0)
    """Number of Ray actors, each with a VAE; 0: as many as fit."""
    cpus_per_encoder: float = Field(1.0, gt=0)
    """CPUs to reserve per encoder; on a small machine, a fraction leaves room for decoders."""
    gpus_per_encoder: float = Field(1.0, ge=0)
    """GPUs to reserve per encoder on CUDA."""
    threads_per_encoder: int = Field(1, ge=1)
    """Threads per VAE on a CPU; affects the last bits of latents."""
    decoders: int = Field(0, ge=0)
    """Maximum number of concurrent Ray tasks that decode and crop images (about 220 ImageNet images/s per
    core); 0: as many as fit besides the encoders and one writer."""
    cpus_per_decoder: float = Field(0.5, gt=0)
    """CPUs to reserve per decoding or shard-writing task."""
    max_quarantined: float = Field(0.001, ge=0, le=1)
    """Fraction of unreadable images above which the job fails."""
    ray_address: str = "auto"
    """Ray cluster: `auto` joins the one in RAY_ADDRESS or starts a local one; `local`; or HOST:PORT."""
    log_every_s: float = Field(15.0, gt=0)
    """Seconds between two rows of the output's metrics.jsonl."""


RootConfig = TypeVar("RootConfig", bound=Section)


def load(
    root: type[RootConfig],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    keep_relative: bool = False,
) -> RootConfig:
    """Read a configuration: defaults, then the YAML file or recipe, then `key=value` overrides.

    Paths become absolute unless `keep_relative` is set. Raises ConfigError for a missing file or recipe,
    invalid YAML, an unknown key (naming the nearest one), a value of the wrong type, or an empty path.
    """
    tree = configfile.read_file(recipes.find(path)) if path is not None else {}
    parsed = [configfile.read_override(text) for text in overrides]
    for override in parsed:
        configfile.apply_override(root, tree, override)
    try:
        config = root.model_validate(configfile.coerce(root, tree))
    except ValidationError as error:
        raise ConfigError(configfile.explain(root, error, path, parsed)) from None
    return with_absolute_paths(
        config, keep_relative, lambda key: configfile.origin_of(key.split("."), path, parsed)
    )


def load_for_training(path: str | Path, overrides: Sequence[str]) -> TrainConfig:
    """Read the configuration of a run that is about to start.

    Raises ConfigError like `load`. Also raises it for the config.yaml of a run folder that was moved, unless
    an override sets `run`: the run would otherwise start over in its old folder.
    """
    config, folder = load(TrainConfig, path, overrides), Path(os.path.abspath(path)).parent
    if Path(path).name != "config.yaml" or not (folder / "events.jsonl").is_file():
        return config
    saved = load(TrainConfig, path)
    if _is_folder(saved.run, folder):
        return config
    if not any(text.partition("=")[0].strip() == "run" for text in overrides):
        raise ConfigError(
            f"{path} belongs to a run that was in {saved.run}; pass run={folder} to resume it here, or "
            "another run=FOLDER to start a new run"
        )
    if config.checkpoint.url == saved.checkpoint.url and _is_folder(config.run, folder):
        return relocated(config, config.run, saved.run)
    return config


def _is_folder(path: str, folder: Path) -> bool:
    return os.path.isdir(path) and folder.samefile(path)


def relocated(config: TrainConfig, folder: str, old: str | None = None) -> TrainConfig:
    """Return the configuration of a run whose folder is now `folder`.

    A `checkpoint.url` inside the old run folder moves with it. `old` defaults to the configured run folder.
    """
    old, new = old or config.run, os.path.abspath(folder)
    url = config.checkpoint.url
    if url == old or url.startswith(f"{old}/"):
        url = new + url.removeprefix(old)
    checkpoint = config.checkpoint.model_copy(update={"url": url})
    return config.model_copy(update={"run": new, "checkpoint": checkpoint})


def dump(config: Section) -> str:
    """Format the resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
