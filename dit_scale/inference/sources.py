"""Sources of weights: a run, a checkpoint, an exported file, the published .pt files, a diffusers pipeline.

Each yields a `WeightsSource`: the model's configuration and its fp32 state under the published names.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dit_scale import weights
from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import MANIFEST, CheckpointId
from dit_scale.checkpoint.partition import MASTER
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import ModelConfig
from dit_scale.errors import CheckpointError, ConfigError, WeightsError
from dit_scale.models import dit
from dit_scale.models.dit import DiT
from dit_scale.models.embeddings import sincos_pos_embed
from dit_scale.models.zoo import shape_of
from dit_scale.storage import open_storage
from dit_scale.train import averages
from dit_scale.train.ema import ema_kind
from dit_scale.train.run_folder import root_of_folder
from dit_scale.weights.files import SUFFIXES
from dit_scale.weights.pipeline import VAE, TimestepEmbedding, is_pipeline, read_pipeline
from dit_scale.weights.wrappers import EMA

RAW = "raw"
"""Name of the weights themselves, where an EMA profile is expected."""
_OWN_MODEL = "defines its own model; omit --model, --image-size and --num-classes"
_OWN_EMBEDDING = "defines its own timestep embedding; omit --timestep-embedding"


@dataclass(frozen=True)
class WeightsSource:
    """Weights to sample from, and their origin."""

    model: ModelConfig
    state: dict[str, Tensor]
    description: str
    timesteps: int = 1000
    vae: str | None = None
    """Folder or hub name of the run's VAE, or None if unknown."""
    vae_sha256: str | None = None
    """SHA-256 of the weights of the VAE that made the latents, or None if unknown."""
    ema: str | None = None
    """EMA profile, RAW for the weights themselves, or None if unknown."""
    step: int | None = None
    """Optimizer steps taken, or None if unknown."""
    data: str | None = None
    """Folder or URL of the run's data set, or None if unknown."""
    class_names: Mapping[int, str] = field(default_factory=dict)
    """Names of classes by number, as far as the source tells; a run tells where its data set is instead."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Additional metadata for an exported file."""


def open_source(
    path: str,
    ema: str | None = None,
    model: ModelConfig | None = None,
    timestep_embedding: TimestepEmbedding | None = None,
) -> WeightsSource:
    """Read the weights of a run folder, a checkpoint folder, a weights file or a folder of a DiTPipeline.

    `ema` names the EMA profile of a run or checkpoint; None selects the first of its configuration, and RAW
    the weights themselves. `model` describes a bare weights file, DiT-XL/2 at 256 pixels by default; every
    other source defines its model itself. `timestep_embedding` is for a bare file, by default "paper", or a
    pipeline, by default "diffusers", which computes what diffusers computes. Raises CheckpointError,
    WeightsError or ConfigError.
    """
    if (is_folder := is_pipeline(path)) or Path(path).is_file():
        if ema is not None:
            raise ConfigError(f"{path} has no EMA profiles; omit --ema, which is for a run or a checkpoint")
        if not is_folder:
            return _from_file(Path(path), model, timestep_embedding)
        if model is not None:
            raise ConfigError(f"{path} {_OWN_MODEL}")
        return _from_pipeline(Path(path), timestep_embedding or "diffusers")
    _, open_newest = checkpoints_at(path)[0]
    if model is not None:
        raise ConfigError(f"{path} {_OWN_MODEL}")
    if timestep_embedding is not None:
        raise ConfigError(f"{path} {_OWN_EMBEDDING}")
    return _from_checkpoint(open_newest(), ema)


def checkpoints_at(path: str) -> list[tuple[str, Callable[[], Checkpoint]]]:
    """Return name and opener of each checkpoint of a run folder, newest first, or of one checkpoint folder.

    A checkpoint folder may be an s3:// URL. Raises CheckpointError for a run without a committed checkpoint,
    and WeightsError for any other path.
    """
    above, _, name = path.rstrip("/").rpartition("/")
    checkpoint_id = CheckpointId.parse(name)
    if checkpoint_id and open_storage(above or ".").exists(f"{name}/{MANIFEST}"):
        return [(path, lambda: Checkpoint(open_storage(above or "."), checkpoint_id, folder=""))]
    if (Path(path) / "config.yaml").is_file():
        root = root_of_folder(path)
        ids = committed(root)
        if not ids:
            raise CheckpointError(f"{path} has no committed checkpoint yet")
        return [(checkpoint_id.path(), partial(Checkpoint, root, checkpoint_id)) for checkpoint_id in ids]
    raise WeightsError(
        f"{path}: expected a run folder, a checkpoint folder, a weights file ({', '.join(SUFFIXES)}), or the "
        "folder of a diffusers pipeline"
    )


def _from_checkpoint(checkpoint: Checkpoint, ema: str | None) -> WeightsSource:
    profile = ema or checkpoint.config.ema[0].name
    if profile == RAW:
        trained, described = checkpoint.read_whole(MASTER), f"raw weights of {checkpoint}"
        return replace(source_of_run(checkpoint, trained, described), ema=RAW)
    if ema_kind(profile) not in checkpoint.kinds():
        names = sorted(kind.removeprefix("ema.") for kind in checkpoint.kinds() if kind.startswith("ema."))
        raise CheckpointError(
            f"{checkpoint} has no EMA profile {profile!r}; it has {', '.join(names) or 'none'}; "
            f"--ema {RAW} takes the weights themselves"
        )
    trained = checkpoint.read_whole(ema_kind(profile))
    return replace(source_of_run(checkpoint, trained, _described(checkpoint, profile)), ema=profile)


def _described(checkpoint: Checkpoint, profile: str) -> str:
    manifest, text = checkpoint.manifest, f"EMA {profile} of {checkpoint}"
    since_step = manifest.ema_since.get(profile, 0)
    for entry in checkpoint.config.ema:
        share = averages.foreign_share(entry, since_step, manifest.step) if entry.name == profile else 0.0
        if flaw := averages.describe_share(since_step, share):
            text += f" ({flaw})"
    return text


def source_of_run(
    checkpoint: Checkpoint,
    trained: Mapping[str, Tensor],
    description: str,
    details: Mapping[str, str] | None = None,
) -> WeightsSource:
    """Make a source from trained parameters and the configuration of the checkpoint that they come from."""
    config = checkpoint.config
    shape = shape_of(config.model)
    return WeightsSource(
        model=config.model,
        # Checkpoints hold only trained parameters; the position embedding is computed.
        state={"pos_embed": sincos_pos_embed(shape.width, shape.grid), **trained},
        description=description,
        timesteps=config.diffusion.timesteps,
        vae=config.data.vae,
        vae_sha256=checkpoint.manifest.vae_sha256,
        step=checkpoint.manifest.step,
        data=config.data.url,
        details=details or {},
    )


def _from_file(
    path: Path, model: ModelConfig | None, timestep_embedding: TimestepEmbedding | None
) -> WeightsSource:
    file = weights.read_file(path)
    if "model" in file.metadata:
        if model is not None:
            raise ConfigError(f"{path} {_OWN_MODEL}")
        if timestep_embedding is not None:
            raise ConfigError(f"{path} {_OWN_EMBEDDING}")
        model = ModelConfig.model_validate_json(file.metadata["model"])
    model = model or ModelConfig()
    if timestep_embedding is not None:
        model = model.model_copy(update={"timestep_embedding": timestep_embedding})
    return WeightsSource(
        model=model,
        state=file.tensors,
        description=str(file),
        ema=RAW if file.keys and EMA not in file.keys else None,
        timesteps=int(file.metadata.get("timesteps", 1000)),
        vae=file.metadata.get("vae"),
        vae_sha256=file.metadata.get("vae_sha256"),
        class_names=_names_in(file.metadata),
    )


def _from_pipeline(folder: Path, timestep_embedding: TimestepEmbedding) -> WeightsSource:
    pipeline = read_pipeline(folder, timestep_embedding)
    return WeightsSource(
        model=pipeline.model,
        state=pipeline.state,
        description=f"diffusers pipeline {folder}, timestep embedding of {timestep_embedding}",
        timesteps=pipeline.timesteps,
        vae=str(folder / VAE),
        vae_sha256=pipeline.metadata.get("vae_sha256"),
        class_names=pipeline.class_names,
    )


def _names_in(metadata: Mapping[str, str]) -> dict[int, str]:
    names: dict[str, str] = json.loads(metadata.get("class_names", "{}"))
    return {int(label): name for label, name in names.items()}


def build_model(source: WeightsSource, device: torch.device, dtype: torch.dtype) -> DiT:
    """Build the model with these weights in `dtype` on `device`, in eval mode and without gradients."""
    # Copied straight to the device and type. A CPU copies, too: the last bits of matrix products may depend
    # on the alignment of memory, which differs between files.
    model = dit.build(source.model, seed=0, device=device, initialise=False).to(dtype)
    weights.load_into(model, source.state)
    return model.eval().requires_grad_(False)
