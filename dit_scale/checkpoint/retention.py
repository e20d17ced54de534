"""Which checkpoints retention keeps, and how it deletes the others. No torch."""

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, MANIFEST, CheckpointId, read_manifest
from dit_scale.storage import Storage

TAG = "KEEP"
"""An object with this name in a checkpoint's folder keeps the checkpoint permanently."""


def kept(ids: list[CheckpointId], keep: int, keep_every_steps: int) -> set[CheckpointId]:
    """Return the newest `keep` of these checkpoints (newest first) and the first of every N-step window."""
    stay = set(ids[:keep])
    if keep_every_steps:
        first = {checkpoint_id.step // keep_every_steps: checkpoint_id for checkpoint_id in ids}
        stay |= {checkpoint_id for window, checkpoint_id in first.items() if window > 0}
    return stay


def superfluous(root: Storage, newest: CheckpointId, keep: int, keep_every_steps: int) -> list[str]:
    """Return the paths of the folders to delete.

    Checkpoints newer than `newest` do not count: the run has skipped them. Older folders that have no
    manifest or are not on the chain are leftovers of kills and superseded attempts; they are deleted too.
    """
    on_chain = [checkpoint_id for checkpoint_id in attempts.committed(root) if checkpoint_id <= newest]
    recent = kept(on_chain, _window(root, on_chain, keep), keep_every_steps)
    stay = (
        {checkpoint_id.path() for checkpoint_id in recent}
        | {checkpoint_id.path(EMA) for checkpoint_id in attempts.committed(root, EMA)}
        | _tagged(root)
    )
    below = _folders(root, CHECKPOINTS, newest) | _folders(root, EMA, newest)
    return sorted(below - stay)


def _window(root: Storage, ids: list[CheckpointId], keep: int) -> int:
    """Return how many of the newest checkpoints contain `keep` readable ones."""
    readable = 0
    for number, checkpoint_id in enumerate(ids):
        if readable == keep:
            return number
        readable += attempts.is_readable(root, checkpoint_id)
    return len(ids)


def prune(root: Storage, attempt: int, newest: CheckpointId, keep: int, keep_every_steps: int) -> list[str]:
    """Delete what retention does not keep, manifests first, and return its paths.

    The files of `newest` were read back before; its manifest is read back here. Checks the chain before each
    delete: raises SupersededError and deletes nothing more once a later attempt has started.
    """
    read_manifest(root, newest)
    paths = superfluous(root, newest, keep, keep_every_steps)
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
