"""Where weights come from: a run, its checkpoints and stored averages, exported files, a published .pt.

All end in a `Source`: the model's configuration and its fp32 state by the published names.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dit_scale import weights
from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, MANIFEST, CheckpointId
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import EmaProfile, ModelConfig
from dit_scale.errors import CheckpointError, WeightsError
from dit_scale.inference import posthoc
from dit_scale.inference.posthoc import PowerProfile
from dit_scale.models import dit
from dit_scale.models.dit import DiT
from dit_scale.models.embeddings import sincos_pos_embed
from dit_scale.models.zoo import shape_of
from dit_scale.storage import Storage, open_storage
from dit_scale.train import averages
from dit_scale.train.ema import ema_kind
from dit_scale.train.run_folder import root_of_folder

_DIGEST = "dit_scale_sha256"
"""Key of an export's metadata that has the digest of all else in the file."""


@dataclass(frozen=True)
class WeightsSource:
    """Weights to sample from, and where they came from."""

    model: ModelConfig
    state: dict[str, Tensor]
    description: str
    timesteps: int = 1000
    vae: str | None = None
    """The autoencoder that the run was configured with, when the source knows it."""
    vae_sha256: str | None = None
    """Of the weights of the autoencoder that made the latents, when the source knows it."""
    details: Mapping[str, str] = field(default_factory=dict)
    """What else an export says about where the weights came from."""


@dataclass(frozen=True)
class StoredAverage:
    """A power-function average that a run holds."""

    checkpoint: Checkpoint
    """Of all state, or of averages alone."""
    name: str
    """Of its profile in the run's configuration."""
    profile: PowerProfile
    since_step: int = 0
    """Step since which it is tracked; the latest that it can be where the checkpoint does not say it."""

    @property
    def foreign_share(self) -> float:
        """How much of it is no average of weights (`dit_scale.train.averages`)."""
        tracked = EmaProfile(name=self.name, sigma_rel=self.profile.sigma_rel)
        return averages.foreign_share(tracked, self.since_step, self.profile.step)

    @property
    def flaw(self) -> str:
        """Why it is not what its profile says; empty when it is."""
        return averages.describe_share(self.since_step, self.foreign_share)


def open_source(path: str, ema: str | None = None, model: ModelConfig | None = None) -> WeightsSource:
    """Weights of a run's folder, a checkpoint's folder, a safetensors file or a published .pt.

    `ema` names the profile (the first of the configuration if None). `model` says what a bare weights
    file is of; exported files say it themselves. Raises CheckpointError, WeightsError or ConfigError.
    """
    if Path(path).is_file():
        return _from_file(Path(path), model)
    newest = checkpoints_at(path)[0][1]
    return _from_checkpoint(newest(), ema)


def checkpoints_at(path: str) -> list[tuple[str, Callable[[], Checkpoint]]]:
    """The checkpoints of a run's folder, newest first, or the one in a checkpoint's folder, to be opened.

    A checkpoint's folder may be an s3:// url. Raises CheckpointError where there is none.
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
        f"{path}: expected a run's folder, a checkpoint's folder, or a .safetensors or .pt file of weights"
    )


def _from_checkpoint(checkpoint: Checkpoint, ema: str | None) -> WeightsSource:
    profile = ema or checkpoint.config.ema[0].name
    if ema_kind(profile) not in checkpoint.kinds():
        held = sorted(kind.removeprefix("ema.") for kind in checkpoint.kinds() if kind.startswith("ema."))
        raise CheckpointError(f"{checkpoint} has no EMA profile {profile!r}; it has {', '.join(held)}")
    return _of_run(checkpoint, checkpoint.read_whole(ema_kind(profile)), _described(checkpoint, profile))


def _described(checkpoint: Checkpoint, profile: str) -> str:
    manifest, text = checkpoint.manifest, f"EMA {profile} of {checkpoint}"
    since_step = manifest.ema_since.get(profile, 0)
    for entry in checkpoint.config.ema:
        share = averages.foreign_share(entry, since_step, manifest.step) if entry.name == profile else 0.0
        if flaw := averages.describe_share(since_step, share):
            text += f" ({flaw})"
    return text


def _of_run(
    checkpoint: Checkpoint,
    trained: Mapping[str, Tensor],
    description: str,
    details: Mapping[str, str] | None = None,
) -> WeightsSource:
    """The weights of a run's checkpoint, with the configuration in that checkpoint."""
    config = checkpoint.config
    shape = shape_of(config.model)
    return WeightsSource(
        model=config.model,
        # Checkpoints hold what is trained; the position embedding is a formula.
        state={"pos_embed": sincos_pos_embed(shape.width, shape.grid), **trained},
        description=description,
        timesteps=config.diffusion.timesteps,
        vae=config.data.vae,
        vae_sha256=checkpoint.manifest.vae_sha256,
        details=details or {},
    )


def _from_file(path: Path, model: ModelConfig | None) -> WeightsSource:
    said, state = weights.read_metadata(path), weights.read(path)
    carried = said.pop(_DIGEST, "")  # other programs write none
    if carried and carried != weights.digest(state, said):
        raise WeightsError(f"{path} is damaged (its SHA-256 does not fit); fetch or export it again")
    config = ModelConfig.model_validate_json(said["model"]) if "model" in said else ModelConfig()
    return WeightsSource(
        model=model or config,
        state=state,
        description=str(path),
        timesteps=int(said.get("timesteps", 1000)),
        vae=said.get("vae"),
        vae_sha256=said.get("vae_sha256"),
    )


def stored_averages(root: Storage) -> tuple[list[StoredAverage], list[str]]:
    """All power-function averages below a run's root, by step and width; and why others cannot be opened.

    Of two with the same width and step, the one that is nearer to its profile.
    """
    held: list[tuple[Checkpoint, tuple[EmaProfile, ...]]] = []
    problems = []
    candidates = [(one, folder) for folder in (CHECKPOINTS, EMA) for one in committed(root, folder)]
    for checkpoint_id, folder in candidates:
        try:
            checkpoint = Checkpoint(root, checkpoint_id, folder)
            held.append((checkpoint, checkpoint.config.ema))
        except CheckpointError as error:
            problems.append(str(error))
    found: dict[PowerProfile, StoredAverage] = {}
    for one in _with_history(sorted(held, key=lambda pair: pair[0].manifest.step)):
        if one.profile not in found or one.foreign_share <= found[one.profile].foreign_share:
            found[one.profile] = one
    return sorted(found.values(), key=lambda one: (one.profile.step, one.profile.sigma_rel)), problems


def _with_history(held: Iterable[tuple[Checkpoint, tuple[EmaProfile, ...]]]) -> Iterator[StoredAverage]:
    """The averages of checkpoints with these profiles, given by step, and since when each is tracked.

    Where a checkpoint does not say it: if the profile was not in the one before, or had another width there,
    then since this one at the latest.
    """
    before: dict[EmaProfile, int] | None = None
    for checkpoint, profiles in held:
        step, known = checkpoint.manifest.step, checkpoint.manifest.ema_since
        since = {
            entry: known.get(entry.name, 0 if before is None else before.get(entry, step))
            for entry in profiles
        }
        for entry, since_step in since.items():
            if step and entry.sigma_rel is not None and ema_kind(entry.name) in checkpoint.kinds():
                yield StoredAverage(checkpoint, entry.name, PowerProfile(entry.sigma_rel, step), since_step)
        before = since


def reconstruct(
    stored: Sequence[StoredAverage],
    target: PowerProfile,
    show: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> WeightsSource:
    """The average of another width, from those stored up to its step (`dit_scale.inference.posthoc`).

    One parameter at a time: the result is the only model in memory. `show`
    passes on the parameters' names, to tell how far it is. Raises CheckpointError when the stored averages
    do not give it well enough, or one of them is damaged.
    """
    fit = posthoc.fit([average.profile for average in stored], target)
    used = [(average, weight) for average, weight in zip(stored, fit.weights, strict=True) if weight]
    newest = used[-1][0].checkpoint
    trained = {}
    for parameter in show(newest.manifest.model_shapes):
        shape = newest.manifest.model_shapes[parameter]
        total = torch.zeros(math.prod(shape), dtype=torch.float64)
        for average, weight in used:
            values = average.checkpoint.read(ema_kind(average.name), parameter, 0, len(total))
            total.add_(values, alpha=weight)
        trained[parameter] = total.float().reshape(shape)
    parts = [
        {"checkpoint": str(average.checkpoint), "profile": average.name, "weight": weight}
        for average, weight in used
    ]
    return _of_run(
        newest,
        trained,
        f"EMA of sigma_rel {target.sigma_rel:g} at step {target.step}, rebuilt from {len(used)} stored "
        f"averages of {newest.storage.url} (predicted error {fit.error:.2%})",
        {"predicted_error": f"{fit.error:.2e}", "rebuilt_from": json.dumps(parts)},
    )


def build_model(source: WeightsSource, device: torch.device, dtype: torch.dtype) -> DiT:
    """The model with the source's weights, ready for inference."""
    model = dit.build(source.model, seed=0, initialise=False)
    weights.load_into(model, source.state)
    return model.to(device, dtype).eval().requires_grad_(False)


def export(source: WeightsSource, path: Path) -> None:
    """Write the weights as one fp32 safetensors file that says all that `open_source` needs to know of it."""
    metadata = {
        "model": source.model.model_dump_json(),
        "source": source.description,
        "timesteps": str(source.timesteps),
        "vae": source.vae,
        "vae_sha256": source.vae_sha256,
        **source.details,
    }
    said = {key: value for key, value in metadata.items() if value is not None}
    state = {name: tensor.float() for name, tensor in source.state.items()}
    weights.write(state, path, {**said, _DIGEST: weights.digest(state, said)})
