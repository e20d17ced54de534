"""The chain of attempts: which start of the run counts, and which checkpoints belong to its past. No torch.

Every start claims the next number by a conditional put of `attempts/<n>.json` that names the checkpoint
it goes on from. A manifest counts when its attempt is the newest one, or when a later attempt on the
chain went on from it or from a later checkpoint of the same attempt. So an old attempt that wakes up
after the next one began can put a manifest, but no reader takes it; and `check_current`, asked before
every commit and every delete, tells it so.

A record that is damaged or gone takes nothing with it: the names of folders give its number as well, which
is not used again, and its checkpoints count.
"""

import secrets
from contextlib import suppress
from dataclasses import dataclass, field

from dit_scale.checkpoint.manifest import (
    ATTEMPTS,
    CHECKPOINTS,
    EMA,
    MANIFEST,
    CheckpointId,
    read_manifest,
)
from dit_scale.errors import CheckpointError, SupersededError
from dit_scale.sealed import sealed, unseal
from dit_scale.storage import MissingKeyError, Storage

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class AttemptRecord:
    """One start of the run."""

    number: int
    resumed_from: CheckpointId | None = None
    """None for a start from nothing."""
    excluded_positions: Ranges = field(default=())
    """Ranges of positions that the run leaves out from here on, all of them so far."""


def claim(root: Storage, attempt: AttemptRecord) -> None:
    """Begin this attempt. Raises SupersededError when another process was faster, or has a later one."""
    key = _key(attempt.number)
    if not root.exists(key):
        _refuse_old(root, attempt.number)  # numbers may have gaps
    tree = {
        "attempt": attempt.number,
        "resumed_from": attempt.resumed_from and attempt.resumed_from.path(),
        "excluded_positions": attempt.excluded_positions,
        "nonce": secrets.token_hex(16),  # two starts never put the same bytes, so one of them loses
    }
    if not root.write_new(key, sealed(tree)):
        raise SupersededError(
            f"{root.url}: another process has just started attempt {attempt.number} of this run"
        )


def numbers(root: Storage) -> list[int]:
    """The numbers of all attempts, ascending: of those with a record, and of those that left a folder."""
    return sorted(_recorded(root) | _with_folders(root, CHECKPOINTS) | _with_folders(root, EMA))


def unrecorded(root: Storage) -> list[int]:
    """The numbers above that of the newest record; none where there is no record at all."""
    newest_recorded = max(_recorded(root), default=float("inf"))
    return [number for number in numbers(root) if number > newest_recorded]


def problems(root: Storage) -> list[str]:
    """Which records of attempts are missing, damaged or under a wrong name."""
    found = []
    for number in numbers(root) if _recorded(root) else ():
        try:
            read(root, number)
        except CheckpointError as error:
            found.append(str(error))
    return found


def read(root: Storage, number: int) -> AttemptRecord:
    """The record of an attempt. Raises CheckpointError, naming it, when it is damaged or not there."""
    key = _key(number)
    where = f"{root.url}/{key}"
    try:
        tree = unseal(root.read(key), where, CheckpointError)
    except MissingKeyError:
        raise CheckpointError(
            f"{where} is missing; checkpoints of attempt {number} count as far as they can be read"
        ) from None
    if tree["attempt"] != number:
        raise CheckpointError(f"{where} is the record of attempt {tree['attempt']}: it was copied or renamed")
    excluded = tuple((int(low), int(high)) for low, high in tree["excluded_positions"])
    return AttemptRecord(number, _parsed(tree["resumed_from"], where), excluded)


def _parsed(resumed_from: str | None, where: str) -> CheckpointId | None:
    if resumed_from is None:
        return None
    checkpoint_id = CheckpointId.parse(resumed_from.removeprefix(f"{CHECKPOINTS}/"))
    if checkpoint_id is None:
        raise CheckpointError(
            f"{where}: expected resumed_from to be the path of a checkpoint, got {resumed_from}"
        )
    return checkpoint_id


def newest(root: Storage) -> AttemptRecord | None:
    """The newest attempt whose record is whole; None when there is none."""
    for number in reversed(numbers(root)):
        try:
            return read(root, number)
        except CheckpointError:
            continue
    return None


def check_current(root: Storage, attempt: int) -> None:
    """Raises SupersededError when a later attempt has begun."""
    _refuse_old(root, attempt)


def _refuse_old(root: Storage, attempt: int) -> None:
    later = [number for number in _recorded(root) if number > attempt]
    if later:
        raise SupersededError(
            f"{root.url}: attempt {min(later)} of this run has begun; attempt {attempt} may change nothing"
        )


def committed(root: Storage, folder: str = CHECKPOINTS) -> list[CheckpointId]:
    """The checkpoints on the chain that have a manifest, newest first."""
    names = (
        key.removeprefix(f"{folder}/").removesuffix(f"/{MANIFEST}")
        for key, _ in root.list(f"{folder}/")
        if key.endswith(f"/{MANIFEST}")
    )
    limits = _limits(root)
    ids = filter(None, map(CheckpointId.parse, names))
    return sorted((checkpoint_id for checkpoint_id in ids if _counts(checkpoint_id, limits)), reverse=True)


def is_readable(root: Storage, checkpoint_id: CheckpointId) -> bool:
    """Whether a checkpoint has a manifest that is whole and its own."""
    try:
        read_manifest(root, checkpoint_id)
    except CheckpointError:
        return False
    return True


def _counts(checkpoint_id: CheckpointId, limits: dict[int, float] | None) -> bool:
    return limits is None or checkpoint_id.step <= limits.get(checkpoint_id.attempt, -1)


def _limits(root: Storage) -> dict[int, float] | None:
    """Attempt => last step of it that counts. None where no attempt is recorded: then all do."""
    recorded = _recorded(root)
    if not recorded:
        return None
    left = sorted(recorded | _with_folders(root, CHECKPOINTS))
    limits: dict[int, float] = {left[-1]: float("inf")}
    while left:
        number = left.pop()
        if number not in limits:
            continue
        try:
            before = read(root, number).resumed_from
        except CheckpointError:
            # Where it went on from is unknown, but it was no later step than its own first one. Up to there,
            # what its predecessor committed is sound, late or not.
            if left:
                limits.setdefault(left[-1], min(limits[number], _first_step(root, number)))
            continue
        if before is not None:
            limits[before.attempt] = before.step
            left = sorted({*left, before.attempt})  # nothing of it may be left
    return limits


def _first_step(root: Storage, number: int) -> float:
    """Step of the first checkpoint of an attempt that is there; infinite when there is none."""
    steps = []
    for checkpoint_id in _ids(root, CHECKPOINTS):
        if checkpoint_id.attempt == number:
            with suppress(CheckpointError):  # damaged, or another attempt's under a wrong name
                steps.append(read_manifest(root, checkpoint_id).step)
    return min(steps, default=float("inf"))


def _recorded(root: Storage) -> set[int]:
    keys = (key.removeprefix(f"{ATTEMPTS}/").removesuffix(".json") for key, _ in root.list(f"{ATTEMPTS}/"))
    return {int(key) for key in keys if key.isdecimal()}


def _with_folders(root: Storage, folder: str) -> set[int]:
    return {checkpoint_id.attempt for checkpoint_id in _ids(root, folder)}


def _ids(root: Storage, folder: str) -> set[CheckpointId]:
    """The checkpoints below a folder, committed or not."""
    names = {key.split("/")[1] for key, _ in root.list(f"{folder}/")}
    return set(filter(None, map(CheckpointId.parse, names)))


def _key(number: int) -> str:
    return f"{ATTEMPTS}/{number:04d}.json"
