"""Which checkpoints stay, and how the others go. No torch."""

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, MANIFEST, CheckpointId, read_manifest
from dit_scale.storage import Storage

TAG = "KEEP"
"""An object of this name in a checkpoint's folder keeps it for good."""


def kept(ids: list[CheckpointId], keep: int, keep_every_steps: int) -> set[CheckpointId]:
    """From checkpoints (newest first), the newest `keep`, and the first of every so many steps."""
    stay = set(ids[:keep])
    if keep_every_steps:
        first = {checkpoint_id.step // keep_every_steps: checkpoint_id for checkpoint_id in ids}
        stay |= {checkpoint_id for window, checkpoint_id in first.items() if window > 0}
    return stay


def superfluous(root: Storage, newest: CheckpointId, keep: int, keep_every_steps: int) -> list[str]:
    """Folders that do not stay.

    It counts down from `newest`. What sorts above it does not count: the run has passed over it.
    Folders below it that are no checkpoint, or none on the chain, are what kills and old attempts left
    behind; they go too.
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
    """How many of the newest have `keep` among them whose manifests can be read."""
    readable = 0
    for number, checkpoint_id in enumerate(ids):
        if readable == keep:
            return number
        readable += attempts.is_readable(root, checkpoint_id)
    return len(ids)


def prune(root: Storage, attempt: int, newest: CheckpointId, keep: int, keep_every_steps: int) -> list[str]:
    """Delete what does not stay, manifests first, and name it.

    `newest` is a checkpoint whose files were read again; its manifest is read again here. Before each
    delete the chain is asked: SupersededError, and nothing more goes, once a later attempt has begun.
    """
    read_manifest(root, newest)
    gone = superfluous(root, newest, keep, keep_every_steps)
    for folder in gone:
        delete(root, attempt, folder)
    return gone


def delete(root: Storage, attempt: int, folder: str) -> None:
    """Delete a checkpoint, manifest first. Raises SupersededError once a later attempt began."""
    for key in sorted(_keys(root, folder), key=lambda key: (key != f"{folder}/{MANIFEST}", key)):
        attempts.check_current(root, attempt)
        root.delete(key)


def _folders(root: Storage, folder: str, newest: CheckpointId) -> set[str]:
    """Paths of the checkpoints below a folder that are older than `newest`, committed or not."""
    names = {key.split("/")[1] for key in _keys(root, folder)}
    ids = filter(None, map(CheckpointId.parse, names))
    return {checkpoint_id.path(folder) for checkpoint_id in ids if checkpoint_id < newest}


def _keys(root: Storage, folder: str) -> list[str]:
    """All that lies in a folder, also what killed writers left there."""
    return [key for key, _ in root.list(f"{folder}/")] + [*root.leftovers(f"{folder}/")]


def _tagged(root: Storage) -> set[str]:
    ending = f"/{TAG}"
    return {key.removesuffix(ending) for key, _ in root.list(f"{CHECKPOINTS}/") if key.endswith(ending)}
