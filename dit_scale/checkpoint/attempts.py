"""The chain of attempts: which attempt is current, and which checkpoints belong to its past. No torch.

Every attempt claims the next number by creating `attempts/<n>.json`, which names the checkpoint that it
resumes from; only one writer can create it. A manifest counts if its attempt is the newest one, or if a later
attempt on the chain resumed from it or from a later checkpoint of the same attempt. So a stale process of a
superseded attempt may still write a manifest, but no reader accepts it; and `check_current`, which runs
before every commit and every delete, stops the process.

A damaged or missing record invalidates nothing: its number is still known from the names of folders, so that
it is not reused, and its checkpoints count.
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
    """One attempt: a start of training within the run, or a rollback."""

    number: int
    resumed_from: CheckpointId | None = None
    """None for an attempt that starts at step 0."""
    excluded_positions: Ranges = field(default=())
    """All ranges of positions that the run skips from here on."""


def claim(root: Storage, attempt: AttemptRecord) -> None:
    """Start this attempt. Raises SupersededError if another process claimed its number or a later one."""
    key = _key(attempt.number)
    if not root.exists(key):
        check_current(root, attempt.number)  # numbers may have gaps
    tree = {
        "attempt": attempt.number,
        "resumed_from": attempt.resumed_from and attempt.resumed_from.path(),
        "excluded_positions": attempt.excluded_positions,
        "nonce": secrets.token_hex(16),  # two attempts never write the same bytes, so one of them loses
    }
    if not root.write_new(key, sealed(tree)):
        raise SupersededError(
            f"{root.url}: another process has just started attempt {attempt.number} of this run"
        )


def numbers(root: Storage) -> list[int]:
    """Return the numbers of all attempts that have a record or left a folder, ascending."""
    return sorted(_recorded(root) | _with_folders(root, CHECKPOINTS) | _with_folders(root, EMA))


def unrecorded(root: Storage) -> list[int]:
    """Return the numbers above the newest record; none if there is no record at all."""
    newest_recorded = max(_recorded(root), default=float("inf"))
    return [number for number in numbers(root) if number > newest_recorded]


def problems(root: Storage) -> list[str]:
    """Describe all records of attempts that are missing, damaged or under a wrong name."""
    found = []
    for number in numbers(root) if _recorded(root) else ():
        try:
            read(root, number)
        except CheckpointError as error:
            found.append(str(error))
    return found


def read(root: Storage, number: int) -> AttemptRecord:
    """Read the record of an attempt. Raises CheckpointError that names it if it is damaged or missing."""
    key = _key(number)
    where = f"{root.url}/{key}"
    try:
        tree = unseal(root.read(key), where, CheckpointError)
    except MissingKeyError:
        raise CheckpointError(
            f"{where} is missing; all readable checkpoints of attempt {number} count"
        ) from None
    if tree["attempt"] != number:
        raise CheckpointError(
            f"{where} holds the record of attempt {tree['attempt']}: it was copied or renamed"
        )
    excluded = tuple((int(low), int(high)) for low, high in tree["excluded_positions"])
    return AttemptRecord(number, _parsed(tree["resumed_from"], where), excluded)


def _parsed(resumed_from: str | None, where: str) -> CheckpointId | None:
    if resumed_from is None:
        return None
    checkpoint_id = CheckpointId.parse(resumed_from.removeprefix(f"{CHECKPOINTS}/"))
    if checkpoint_id is None:
        raise CheckpointError(
            f"{where}: expected the path of a checkpoint in resumed_from, got {resumed_from}"
        )
    return checkpoint_id


def newest(root: Storage) -> AttemptRecord | None:
    """Return the newest attempt with an intact record, or None."""
    for number in reversed(numbers(root)):
        try:
            return read(root, number)
        except CheckpointError:
            continue
    return None


def check_current(root: Storage, attempt: int) -> None:
    """Raise SupersededError if a later attempt has started."""
    later = [number for number in _recorded(root) if number > attempt]
    if later:
        raise SupersededError(
            f"{root.url}: attempt {min(later)} of this run has started; attempt {attempt} is superseded and "
            "must not change anything"
        )


def committed(root: Storage, folder: str = CHECKPOINTS) -> list[CheckpointId]:
    """Return the checkpoints on the chain that have a manifest, newest first."""
    names = (
        key.removeprefix(f"{folder}/").removesuffix(f"/{MANIFEST}")
        for key, _ in root.list(f"{folder}/")
        if key.endswith(f"/{MANIFEST}")
    )
    limits = _limits(root)
    ids = filter(None, map(CheckpointId.parse, names))
    return sorted((checkpoint_id for checkpoint_id in ids if _counts(checkpoint_id, limits)), reverse=True)


def is_readable(root: Storage, checkpoint_id: CheckpointId) -> bool:
    """Whether a checkpoint has an intact manifest of its own."""
    try:
        read_manifest(root, checkpoint_id)
    except CheckpointError:
        return False
    return True


def _counts(checkpoint_id: CheckpointId, limits: dict[int, float] | None) -> bool:
    return limits is None or checkpoint_id.step <= limits.get(checkpoint_id.attempt, -1)


def _limits(root: Storage) -> dict[int, float] | None:
    """Return the last step that counts per attempt on the chain; None without records: then all count."""
    recorded = _recorded(root)
    if not recorded:
        return None
    pending = sorted(recorded | _with_folders(root, CHECKPOINTS))
    limits: dict[int, float] = {pending[-1]: float("inf")}
    while pending:
        number = pending.pop()
        if number not in limits:
            continue
        try:
            before = read(root, number).resumed_from
        except CheckpointError:
            # The checkpoint it resumed from is unknown, but no later than its own first one. Up to that step,
            # every commit of its predecessor is valid, even a late one.
            if pending:
                limits.setdefault(pending[-1], min(limits[number], _first_step(root, number)))
            continue
        if before is not None:
            limits[before.attempt] = before.step
            pending = sorted({*pending, before.attempt})  # its record and folders may be missing
    return limits


def _first_step(root: Storage, number: int) -> float:
    """Return the step of the first readable checkpoint of an attempt; infinity if there is none."""
    steps = []
    for checkpoint_id in _ids(root, CHECKPOINTS):
        if checkpoint_id.attempt == number:
            with suppress(
                CheckpointError
            ):  # damaged, or the checkpoint of another attempt under a wrong name
                steps.append(read_manifest(root, checkpoint_id).step)
    return min(steps, default=float("inf"))


def _recorded(root: Storage) -> set[int]:
    keys = (key.removeprefix(f"{ATTEMPTS}/").removesuffix(".json") for key, _ in root.list(f"{ATTEMPTS}/"))
    return {int(key) for key in keys if key.isdecimal()}


def _with_folders(root: Storage, folder: str) -> set[int]:
    return {checkpoint_id.attempt for checkpoint_id in _ids(root, folder)}


def _ids(root: Storage, folder: str) -> set[CheckpointId]:
    """Return the checkpoints below a folder, committed or not."""
    names = {key.split("/")[1] for key, _ in root.list(f"{folder}/")}
    return set(filter(None, map(CheckpointId.parse, names)))


def _key(number: int) -> str:
    return f"{ATTEMPTS}/{number:04d}.json"
