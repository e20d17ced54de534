"""Sources of weights: a run, a checkpoint, an exported file, or the published .pt files.

Each yields a `WeightsSource`: the model's configuration and its fp32 state under the published names.
"""

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

RAW = "raw"
"""Name of the weights themselves, where an EMA profile is expected."""
_DIGEST = "dit_scale_sha256"
"""Metadata key of an exported file: the SHA-256 of everything else in the file."""
_OWN_MODEL = "defines its own model; omit --model, --image-size and --num-classes"


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
    details: Mapping[str, str] = field(default_factory=dict)
    """Additional metadata for an exported file."""


def open_source(path: str, ema: str | None = None, model: ModelConfig | None = None) -> WeightsSource:
    """Read the weights of a run folder, a checkpoint folder, a .safetensors file or a published .pt file.

    `ema` names the EMA profile of a run or checkpoint; None selects the first of its configuration, and RAW
    the weights themselves. `model`
    describes a bare weights file, DiT-XL/2 at 256 pixels by default; every other source defines its model
    itself. Raises CheckpointError, WeightsError or ConfigError.
    """
    if Path(path).is_file():
        return _from_file(Path(path), model)
    _, open_newest = checkpoints_at(path)[0]
    if model is not None:
        raise ConfigError(f"{path} {_OWN_MODEL}")
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
        f"{path}: expected a run folder, a checkpoint folder, or a .safetensors or .pt weights file"
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
        details=details or {},
    )


def _from_file(path: Path, model: ModelConfig | None) -> WeightsSource:
    metadata, state = weights.read_metadata(path), weights.read(path)
    expected = metadata.pop(_DIGEST, "")  # absent in files of other programs
    if expected and expected != weights.digest(state, metadata):
        raise WeightsError(f"{path} is damaged (SHA-256 mismatch); download or export it again")
    if "model" in metadata:
        if model is not None:
            raise ConfigError(f"{path} {_OWN_MODEL}")
        model = ModelConfig.model_validate_json(metadata["model"])
    return WeightsSource(
        model=model or ModelConfig(),
        state=state,
        description=str(path),
        timesteps=int(metadata.get("timesteps", 1000)),
        vae=metadata.get("vae"),
        vae_sha256=metadata.get("vae_sha256"),
    )


def build_model(source: WeightsSource, device: torch.device, dtype: torch.dtype) -> DiT:
    """Build the model with these weights in `dtype` on `device`, in eval mode and without gradients."""
    model = dit.build(source.model, seed=0, initialise=False)
    weights.load_into(model, source.state)
    return model.to(device, dtype).eval().requires_grad_(False)


def export(source: WeightsSource, path: Path) -> None:
    """Write the weights to one fp32 safetensors file, with all metadata that `open_source` needs."""
    optional = {
        "model": source.model.model_dump_json(),
        "source": source.description,
        "timesteps": str(source.timesteps),
        "vae": source.vae,
        "vae_sha256": source.vae_sha256,
        **source.details,
    }
    metadata = {key: value for key, value in optional.items() if value is not None}
    state = {name: tensor.float() for name, tensor in source.state.items()}
    weights.write(state, path, {**metadata, _DIGEST: weights.digest(state, metadata)})
