"""MANIFEST.json, which commits a checkpoint and describes it, and the names of checkpoints. No torch.

    <root>/attempts/0003.json                                   one per attempt: the chain
    <root>/checkpoints/<step>-<attempt>/rank-00000.safetensors  what each rank owns, immutable
    <root>/checkpoints/<step>-<attempt>/MANIFEST.json           written last
    <root>/ema/<step>-<attempt>/...                             only stored averages, in the same format

docs/formats.md describes the files.
"""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dit_scale.errors import CheckpointError, StorageError
from dit_scale.sealed import unseal
from dit_scale.storage import Storage, UnavailableError

FORMAT = "dit-scale checkpoint"
FORMAT_VERSION = 2
MANIFEST = "MANIFEST.json"
CHECKPOINTS, EMA, ATTEMPTS = "checkpoints", "ema", "attempts"
"""Folders below the root of a run's state."""

_NAME = re.compile(r"(\d{10})-(\d{4,})")


@dataclass(frozen=True, order=True)
class CheckpointId:
    """Identifies a checkpoint of a run. Ids and their names sort by step, then by attempt."""

    step: int
    attempt: int
    """Number of the attempt that wrote it."""

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        return f"{self.step:010d}-{self.attempt:04d}"

    def path(self, folder: str = CHECKPOINTS) -> str:
        """Path of the checkpoint's folder below `folder`; pass "" if the storage itself is that folder."""
        return f"{folder}/{self.name}" if folder else self.name

    @classmethod
    def parse(cls, name: str) -> "CheckpointId | None":
        """Return the id with this name, or None if it is not the name of a checkpoint."""
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), int(match[2])) if match else None


class _Record(BaseModel):
    # Later versions may add keys; the keys that this version needs must exist with the right type.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class FileRecord(_Record):
    """One rank's file; its header has the names of the tensors and the checksums of their blocks."""

    key: str
    """Name below the checkpoint's folder."""
    bytes: int
    header_bytes: int
    """Size of the safetensors header, including the eight bytes of its length."""
    header_sha256: str


class Evaluated(_Record):
    """The result of an evaluation."""

    step: int
    """Steps taken when it was made."""
    measure: str
    """What `value` is, with everything that it depends on besides the weights; empty if it has no value."""
    value: float | None
    """The number by which the best checkpoint is chosen, smaller is better; None if it is not finite."""


class Manifest(_Record):
    """MANIFEST.json: the state of a run at one step, and the files that hold its tensors."""

    format: str = FORMAT
    version: int = FORMAT_VERSION
    step: int
    """Steps taken, including skipped steps."""
    samples: int
    """step * global batch: how far the sample order was consumed."""
    attempt: int
    config: dict[str, Any]
    """Resolved configuration of the run that wrote the checkpoint."""
    data_sha256: str
    """SHA-256 of the latent data set's dataset.json."""
    vae_sha256: str
    """SHA-256 of the weights of the autoencoder that made the latents."""
    model_shapes: dict[str, tuple[int, ...]]
    """Full shape of every trainable parameter."""
    optimizer_groups: tuple[dict[str, Any], ...]
    pending_metrics: tuple[tuple[float, ...], ...] = ()
    """Rows of the steps since the last log point, so that the record continues without a gap."""
    guard: dict[str, float] = {}
    """State of the guard: the running means by which it detects spikes, and the streak of failures."""
    skipped_steps: tuple[int, ...] = ()
    """Skipped steps, counted from 1; AdamW has seen `step` minus these updates."""
    excluded_positions: tuple[tuple[int, int], ...] = ()
    """Half-open ranges of positions that the run skips since a rollback."""
    quarantined: dict[int, str] = {}
    """Sample id => why it cannot be read; the next sample replaces it."""
    ema_since: dict[str, int] = {}
    """EMA profile => step since which its average is tracked; 0 for the run's start, absent if unknown."""
    evaluated: Evaluated | None = Field(None, exclude_if=lambda evaluated: evaluated is None)
    """The last evaluation up to this step; the key is absent if there was none."""
    versions: dict[str, str] = {}
    written_by: dict[str, int] = {}
    """World size and ZeRO stage of the writer; informational."""
    files: tuple[FileRecord, ...] = ()

    @property
    def id(self) -> CheckpointId:
        return CheckpointId(self.step, self.attempt)


def read_manifest(storage: Storage, checkpoint_id: CheckpointId, folder: str = CHECKPOINTS) -> Manifest:
    """Read the manifest of the checkpoint with this id below a folder.

    Raises CheckpointError if it is missing, damaged, of another format, or of another checkpoint.
    """
    path = checkpoint_id.path(folder)
    where = f"{storage.url}/{path}/{MANIFEST}"
    try:
        tree = unseal(storage.read(f"{path}/{MANIFEST}"), where, CheckpointError)
        if (tree.get("format"), tree.get("version")) != (FORMAT, FORMAT_VERSION):
            raise CheckpointError(
                f"{where}: got {tree.get('format')} version {tree.get('version')}, "
                f"this program reads {FORMAT} version {FORMAT_VERSION}"
            )
        manifest = Manifest.model_validate(tree)
    except UnavailableError:
        raise
    except (ValidationError, StorageError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from None
    if manifest.id != checkpoint_id:
        raise CheckpointError(
            f"{storage.url}/{path} holds step {manifest.step} of attempt {manifest.attempt}: it was copied "
            f"or renamed; its own name is {manifest.id}"
        )
    return manifest
