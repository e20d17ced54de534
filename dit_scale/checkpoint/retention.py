"""Which checkpoints stay, and how the others go. No torch."""

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, MANIFEST, is_name, read_manifest, step_and_attempt
from dit_scale.storage import Storage

TAG = "KEEP"
"""An object of this name in a checkpoint's folder keeps it for good."""


def kept(paths: list[str], keep: int, keep_every_steps: int) -> set[str]:
    """From checkpoints (newest first), the newest `keep`, and the first of every so many steps."""
    stay = set(paths[:keep])
    if keep_every_steps:
        first = {step_and_attempt(path)[0] // keep_every_steps: path for path in paths}
        stay |= {path for window, path in first.items() if window > 0}
    return stay


def superfluous(root: Storage, newest: str, keep: int, keep_every_steps: int) -> list[str]:
    """Folders that do not stay.

    It counts down from the path `newest`. What sorts above it does not count: the run has passed over it.
    Folders below it that are no checkpoint, or none on the chain, are what kills and old attempts left
    behind; they go too.
    """
    last = step_and_attempt(newest)
    on_chain = [path for path in attempts.committed(root) if step_and_attempt(path) <= last]
    stay = (
        kept(on_chain, _window(root, on_chain, keep), keep_every_steps)
        | _tagged(root)
        | set(attempts.committed(root, EMA))
    )
    below = _folders(root, CHECKPOINTS, newest) | _folders(root, EMA, newest)
    return sorted(below - stay)


def _window(root: Storage, paths: list[str], keep: int) -> int:
    """How many of the newest have `keep` among them whose manifests can be read."""
    readable = 0
    for number, path in enumerate(paths):
        if readable == keep:
            return number
        readable += attempts.is_readable(root, path)
    return len(paths)


def prune(root: Storage, attempt: int, newest: str, keep: int, keep_every_steps: int) -> list[str]:
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


def _folders(root: Storage, top: str, newest: str) -> set[str]:
    """Folders of checkpoints under `top` whose names sort below that of `newest`."""
    last = step_and_attempt(newest)
    names = {key.split("/")[1] for key in _keys(root, top)}
    return {f"{top}/{name}" for name in names if is_name(name) and step_and_attempt(name) < last}


def _keys(root: Storage, folder: str) -> list[str]:
    """All that lies in a folder, also what killed writers left there."""
    return [key for key, _ in root.list(f"{folder}/")] + [*root.leftovers(f"{folder}/")]


def _tagged(root: Storage) -> set[str]:
    ending = f"/{TAG}"
    return {key.removesuffix(ending) for key, _ in root.list(f"{CHECKPOINTS}/") if key.endswith(ending)}
