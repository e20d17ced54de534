"""Which checkpoints retention keeps, and how it deletes the others. No torch."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, MANIFEST, CheckpointId, Manifest, read_manifest
from dit_scale.errors import CheckpointError
from dit_scale.storage import Storage

TAG = "KEEP"
"""An object with this name in a checkpoint's folder keeps the checkpoint permanently."""


@dataclass(frozen=True)
class Rule:
    """Which checkpoints to keep, as in the section `checkpoint` of a configuration."""

    keep: int
    """Number of newest checkpoints."""
    every_steps: int = 0
    """The first checkpoint of every window of this many steps; 0: none."""
    best: bool = False
    """The checkpoint with the best evaluation."""


def kept(ids: list[CheckpointId], keep: int, keep_every_steps: int) -> set[CheckpointId]:
    """Return the newest `keep` of these checkpoints (newest first) and the first of every N-step window."""
    stay = set(ids[:keep])
    if keep_every_steps:
        first = {checkpoint_id.step // keep_every_steps: checkpoint_id for checkpoint_id in ids}
        stay |= {checkpoint_id for window, checkpoint_id in first.items() if window > 0}
    return stay


def best(manifests: Iterable[Manifest]) -> Manifest | None:
    """Return the manifest of the checkpoint with the smallest value of the newest measure; None without any.

    Values of another measure, for example with another feature network, are not comparable. A checkpoint
    counts if the evaluation was made at its step. Of equal values, the earliest counts.
    """
    found = [
        (one.evaluated, one)
        for one in sorted(manifests, key=lambda one: one.id)
        if one.evaluated and one.evaluated.measure and one.evaluated.step == one.step
    ]
    values = [
        (evaluated.value, manifest)
        for evaluated, manifest in found
        if evaluated.value is not None and evaluated.measure == found[-1][0].measure
    ]
    return min(values, key=lambda pair: pair[0])[1] if values else None


def superfluous(root: Storage, newest: CheckpointId, rule: Rule) -> list[str]:
    """Return the paths of the folders to delete.

    Checkpoints newer than `newest` do not count: the run has skipped them. Older folders that have no
    manifest or are not on the chain are leftovers of kills and superseded attempts; they are deleted too.
    """
    on_chain = [checkpoint_id for checkpoint_id in attempts.committed(root) if checkpoint_id <= newest]
    stay_ids = kept(on_chain, _window(root, on_chain, rule.keep), rule.every_steps)
    if rule.best and (winner := best(_readable(root, on_chain))):
        stay_ids.add(winner.id)
    stay = (
        {checkpoint_id.path() for checkpoint_id in stay_ids}
        | {checkpoint_id.path(EMA) for checkpoint_id in attempts.committed(root, EMA)}
        | _tagged(root)
    )
    below = _folders(root, CHECKPOINTS, newest) | _folders(root, EMA, newest)
    return sorted(below - stay)


def _readable(root: Storage, ids: Iterable[CheckpointId]) -> Iterator[Manifest]:
    """Yield the intact manifests of these checkpoints."""
    for checkpoint_id in ids:
        with suppress(CheckpointError):
            yield read_manifest(root, checkpoint_id)


def _window(root: Storage, ids: list[CheckpointId], keep: int) -> int:
    """Return how many of the newest checkpoints contain `keep` readable ones."""
    readable = 0
    for number, checkpoint_id in enumerate(ids):
        if readable == keep:
            return number
        readable += attempts.is_readable(root, checkpoint_id)
    return len(ids)


def prune(root: Storage, attempt: int, newest: CheckpointId, rule: Rule) -> list[str]:
    """Delete what retention does not keep, manifests first, and return its paths.

    The files of `newest` were read back before; its manifest is read back here. Checks the chain before each
    delete: raises SupersededError and deletes nothing more once a later attempt has started.
    """
    read_manifest(root, newest)
    paths = superfluous(root, newest, rule)
    for path in paths:
        delete(root, attempt, path)
    return paths


def delete(root: Storage, attempt: int, path: str) -> None:
    """Delete a checkpoint, manifest first. Raises SupersededError if a later attempt has started."""
    for key in sorted(_keys(root, path), key=lambda key: (key != f"{path}/{MANIFEST}", key)):
        attempts.check_current(root, attempt)
        root.delete(key)


def _folders(root: Storage, folder: str, newest: CheckpointId) -> set[str]:
    """Return the paths of all checkpoints below a folder that are older than `newest`, committed or not."""
    names = {key.split("/")[1] for key in _keys(root, folder)}
    ids = filter(None, map(CheckpointId.parse, names))
    return {checkpoint_id.path(folder) for checkpoint_id in ids if checkpoint_id < newest}


def _keys(root: Storage, folder: str) -> list[str]:
    """Return all keys in a folder, including leftovers of killed writers."""
    return [key for key, _ in root.list(f"{folder}/")] + [*root.leftovers(f"{folder}/")]


def _tagged(root: Storage) -> set[str]:
    """Return the paths of the checkpoints that a user keeps."""
    suffix = f"/{TAG}"
    return {key.removesuffix(suffix) for key, _ in root.list(f"{CHECKPOINTS}/") if key.endswith(suffix)}
