"""The work of an encoding job: batches that wait for a decoder, and Ray tasks in flight."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dit_scale.errors import DataError
from dit_scale_pipeline.decoder import DecodedBatch
from dit_scale_pipeline.inputs import Entry, Listing
from dit_scale_pipeline.ray_cluster import LostError

if TYPE_CHECKING:
    from ray import ObjectRef

MAX_LOSSES = 5
"""Retries of a lost batch; after more losses, one of its images probably kills each process that reads it."""


@dataclass
class PendingShard:
    """A shard that is not written yet, and the results of its batches by batch number."""

    name: str
    batches: tuple["EncodeBatch", ...] = ()
    decoded: dict[int, DecodedBatch] = field(default_factory=dict)
    moments: dict[int, "ObjectRef"] = field(default_factory=dict)


@dataclass
class EncodeBatch:
    """One VAE batch; all its images belong to one shard."""

    shard: PendingShard
    number: int
    entries: tuple[Entry, ...]
    losses: int = 0


@dataclass(frozen=True)
class DecodeTask:
    """A decoding task; its pixels are available when the task has finished."""

    batch: EncodeBatch
    pixels: "ObjectRef"


@dataclass(frozen=True)
class EncodeTask:
    """A batch submitted to an encoder."""

    batch: EncodeBatch
    pixels: "ObjectRef"
    encoder: int
    submitted_s: float
    """Time of the monotonic clock."""
    is_backup: bool
    """Whether another encoder has had the batch for BACKUP_S."""


@dataclass(frozen=True)
class WriteTask:
    """A task that writes a shard."""

    shard: PendingShard


@dataclass(frozen=True)
class LoadTask:
    """An encoder that loads its VAE, at the start or after a restart; it gets no batches meanwhile."""

    encoder: int
    failures: int = 0
    """Consecutive failures to load."""


Task = DecodeTask | EncodeTask | WriteTask | LoadTask


class TasksInFlight:
    """Submitted tasks by the reference to their result, in the order of submission."""

    def __init__(self) -> None:
        self._tasks: dict[ObjectRef, Task] = {}

    def add(self, result: "ObjectRef", task: Task) -> None:
        self._tasks[result] = task

    def pop(self, result: "ObjectRef") -> Task:
        return self._tasks.pop(result)

    def results(self) -> "list[ObjectRef]":
        return list(self._tasks)

    def encoding(self) -> list[EncodeTask]:
        """Return the batches submitted to encoders."""
        return [task for task in self._tasks.values() if isinstance(task, EncodeTask)]

    def loading(self) -> "dict[ObjectRef, int]":
        """Return the encoders that load their VAE, by result."""
        return {result: task.encoder for result, task in self._tasks.items() if isinstance(task, LoadTask)}

    def count(self, kind: type[Task]) -> int:
        """Return the number of tasks of a kind."""
        return sum(isinstance(task, kind) for task in self._tasks.values())


class BatchQueue:
    """Batches that wait for a decoder: lost ones first, then the rest in the order of the listing."""

    def __init__(self, listing: Listing, shards: dict[str, range], batch_size: int) -> None:
        self._fresh = _batches(listing, shards, batch_size)
        self._lost: deque[EncodeBatch] = deque()

    def pop(self) -> EncodeBatch | None:
        """Return the next batch; None if no batch is waiting."""
        return self._lost.popleft() if self._lost else next(self._fresh, None)

    def retry(self, batch: EncodeBatch, error: Exception) -> None:
        """Queue a lost batch again; raise when it has been lost too often."""
        batch.losses += 1
        if batch.losses <= MAX_LOSSES:
            self._lost.append(batch)
            return
        if not isinstance(error, LostError):
            raise error
        raise DataError(
            f"the batch of images {batch.entries[0].path} to {batch.entries[-1].path} was lost "
            f"{batch.losses} times, the last time: {error}. One of its images may crash the decoder, or "
            "memory may be short: lower decoders or vae_batch, or remove the image; finished shards are kept"
        ) from error


def _batches(listing: Listing, shards: dict[str, range], batch_size: int) -> Iterator[EncodeBatch]:
    for name, rows in shards.items():
        shard = PendingShard(name)
        shard.batches = tuple(
            EncodeBatch(shard, number, listing.entries(rows[start : start + batch_size]))
            for number, start in enumerate(range(0, len(rows), batch_size))
        )
        yield from shard.batches
