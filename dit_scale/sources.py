"""Where weights come from: a run, one of its checkpoints, an exported file, the published .pt.

All end in a `Source`: the model's configuration and its fp32 state by the published names.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dit_scale import weights
from dit_scale.config import ModelConfig
from dit_scale.errors import CheckpointError, WeightsError
from dit_scale.models import dit
from dit_scale.models.dit import DiT
from dit_scale.models.embeddings import sincos_pos_embed
from dit_scale.models.zoo import shape_of
from dit_scale.storage import open_storage
from dit_scale.train.checkpoint import MANIFEST, Checkpoint, committed
from dit_scale.train.ema import ema_kind
from dit_scale.train.run import checkpoints_of


@dataclass(frozen=True)
class Source:
    """Weights to sample from, and where they came from."""

    model: ModelConfig
    state: dict[str, Tensor]
    description: str
    timesteps: int = 1000
    vae: str | None = None
    """The autoencoder that the run was configured with, when the source knows it."""
    vae_sha256: str | None = None
    """Of the weights of the autoencoder that made the latents, when the source knows it."""


def open_source(path: str, ema: str | None = None, model: ModelConfig | None = None) -> Source:
    """Weights of a run's folder, a checkpoint's folder, a safetensors file or a published .pt.

    `ema` names the profile (the first of the configuration if None). `model` says what a bare weights
    file is of; exported files say it themselves. Raises CheckpointError, WeightsError or ConfigError.
    """
    place = Path(path)
    if place.is_file():
        return _from_file(place, model)
    if (place / MANIFEST).is_file():
        return _from_checkpoint(Checkpoint(open_storage(place.parent), place.name), ema)
    if (place / "config.yaml").is_file():
        storage = open_storage(checkpoints_of(place))
        names = committed(storage)
        if not names:
            raise CheckpointError(f"{path} has no committed checkpoint yet")
        return _from_checkpoint(Checkpoint(storage, names[0]), ema)
    raise WeightsError(
        f"{path}: expected a run's folder, a checkpoint's folder, or a .safetensors or .pt file of weights"
    )


def _from_checkpoint(checkpoint: Checkpoint, ema: str | None) -> Source:
    config = checkpoint.config
    shape = shape_of(config.model)
    profile = ema or config.ema[0].name
    if ema_kind(profile) not in checkpoint.kinds():
        held = sorted(kind.removeprefix("ema.") for kind in checkpoint.kinds() if kind.startswith("ema."))
        raise CheckpointError(f"{checkpoint} has no EMA profile {profile!r}; it has {', '.join(held)}")
    return Source(
        model=config.model,
        # Checkpoints hold what is trained; the position embedding is a formula.
        state={
            "pos_embed": sincos_pos_embed(shape.width, shape.grid),
            **checkpoint.read_whole(ema_kind(profile)),
        },
        description=f"EMA {profile} of {checkpoint}",
        timesteps=config.diffusion.timesteps,
        vae=config.data.vae,
        vae_sha256=checkpoint.manifest.vae_sha256,
    )


def _from_file(path: Path, model: ModelConfig | None) -> Source:
    said = weights.read_metadata(path)
    config = ModelConfig.model_validate_json(said["model"]) if "model" in said else ModelConfig()
    return Source(
        model=model or config,
        state=weights.read(path),
        description=str(path),
        timesteps=int(said.get("timesteps", 1000)),
        vae=said.get("vae"),
        vae_sha256=said.get("vae_sha256"),
    )


def build_model(source: Source, device: torch.device, dtype: torch.dtype) -> DiT:
    """The model with the source's weights, ready for inference."""
    model = dit.build(source.model, seed=0, initialise=False)
    weights.load_into(model, source.state)
    return model.to(device, dtype).eval().requires_grad_(False)


def export(source: Source, path: Path) -> None:
    """Write the weights as one fp32 safetensors file that says all that `open_source` needs to know of it."""
    metadata = {
        "model": source.model.model_dump_json(),
        "source": source.description,
        "timesteps": str(source.timesteps),
        "vae": source.vae,
        "vae_sha256": source.vae_sha256,
    }
    weights.write(source.state, path, {key: value for key, value in metadata.items() if value is not None})
