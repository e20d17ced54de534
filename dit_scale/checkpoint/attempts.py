"""The chain of attempts: which start of the run counts, and which checkpoints belong to its past. No torch.

Every start claims the next number by a conditional put of `attempts/<n>.json` that names the checkpoint
it goes on from. A manifest counts when its attempt is the newest one, or when a later attempt on the
chain went on from it or from a later checkpoint of the same attempt. So an old attempt that wakes up
after the next one began can put a manifest, but no reader takes it; and `check_current`, asked before
every commit and every delete, tells it so.
"""

import secrets
from dataclasses import dataclass, field

from dit_scale.checkpoint.manifest import (
    ATTEMPTS,
    CHECKPOINTS,
    MANIFEST,
    is_name,
    sealed,
    step_and_attempt,
    unseal,
)
from dit_scale.errors import CheckpointError, SupersededError
from dit_scale.storage import Storage

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Attempt:
    """One start of the run."""

    number: int
    resumed_from: str | None = None
    """Path of the checkpoint below the root; None for a start from nothing."""
    excluded_positions: Ranges = field(default=())
    """Ranges of positions that the run leaves out from here on, all of them so far."""


def claim(root: Storage, attempt: Attempt) -> None:
    """Begin this attempt. Raises SupersededError when another process was faster."""
    tree = {
        "attempt": attempt.number,
        "resumed_from": attempt.resumed_from,
        "excluded_positions": attempt.excluded_positions,
        "nonce": secrets.token_hex(16),  # two starts never put the same bytes, so one of them loses
    }
    if not root.write_new(_key(attempt.number), sealed(tree)):
        raise SupersededError(
            f"{root.url}: another process has just started attempt {attempt.number} of this run"
        )


def numbers(root: Storage) -> list[int]:
    """The numbers of all attempts, ascending."""
    keys = (key.removeprefix(f"{ATTEMPTS}/").removesuffix(".json") for key, _ in root.list(f"{ATTEMPTS}/"))
    return sorted(int(key) for key in keys if key.isdecimal())


def read(root: Storage, number: int) -> Attempt:
    """The record of an attempt. Raises CheckpointError, naming it, when it is damaged."""
    key = _key(number)
    tree = unseal(root.read(key), f"{root.url}/{key}")
    excluded = tuple((int(low), int(high)) for low, high in tree["excluded_positions"])
    return Attempt(number, tree["resumed_from"], excluded)


def newest(root: Storage) -> Attempt | None:
    """The newest attempt whose record is whole; None when there is none."""
    for number in reversed(numbers(root)):
        try:
            return read(root, number)
        except CheckpointError:
            continue
    return None


def check_current(root: Storage, attempt: int) -> None:
    """Raises SupersededError when a later attempt has begun."""
    if root.exists(_key(attempt + 1)):
        raise SupersededError(
            f"{root.url}: attempt {attempt + 1} of this run has begun; attempt {attempt} may change nothing"
        )


def committed(root: Storage, folder: str = CHECKPOINTS) -> list[str]:
    """Paths of the checkpoints on the chain that have a manifest, newest first."""
    names = (
        key.removeprefix(f"{folder}/").removesuffix(f"/{MANIFEST}")
        for key, _ in root.list(f"{folder}/")
        if key.endswith(f"/{MANIFEST}")
    )
    limits = _limits(root)
    found = [name for name in names if is_name(name) and _counts(name, limits)]
    return [f"{folder}/{name}" for name in sorted(found, key=step_and_attempt, reverse=True)]


def _counts(name: str, limits: dict[int, float] | None) -> bool:
    step, attempt = step_and_attempt(name)
    return limits is None or step <= limits.get(attempt, -1)


def _limits(root: Storage) -> dict[int, float] | None:
    """Attempt => last step of it that counts. None where no attempt is recorded: then all do."""
    left = numbers(root)
    if not left:
        return None
    limits: dict[int, float] = {left[-1]: float("inf")}
    while left:
        number = left.pop()
        if number not in limits:
            continue
        try:
            before = read(root, number).resumed_from
        except CheckpointError:
            # Nobody knows where it went on from. What its predecessor committed is sound, late or not.
            if left:
                limits.setdefault(left[-1], float("inf"))
            continue
        if before is not None:
            step, attempt = step_and_attempt(before)
            limits[attempt] = step
    return limits


def _key(number: int) -> str:
    return f"{ATTEMPTS}/{number:04d}.json"
