"""The batches of all shards on their way through Ray: decoding tasks, encoder actors, writing tasks.

What is under way at once is bounded by the number of decoders and encoders, not by the size of the
input: memory stays flat. Work that Ray loses (a killed process, a dead node) is done again; a shard is
a pure function of its slice of the listing, so it does not matter how often, nor where.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data_pipeline.decoder import DecodedBatch, read_batch
from data_pipeline.inputs import Entry, Listing
from data_pipeline.shards_writer import ShardRecord, write_shard
from dit_scale.config import EncodeConfig
from dit_scale.errors import DataError, DitScaleError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

BATCHES_PER_ENCODER = 2
"""VAE batches given to an encoder at once: one in work, one waiting."""
SHARDS_WRITING = 2
"""Shards being written at once; while there are so many, no further batch is begun."""
TASK_RETRIES = 3
"""Times that Ray runs a task again whose process died."""
MAX_LOSSES = 5
"""Times that a batch is begun again after Ray gave it up; more is an image that kills its decoder."""
BACKUP_S = 120.0
"""Time after which a batch is also given to an encoder that has nothing to do: the first may be gone."""
STALL_S = 30.0
"""Time without any result after which a person hears of it."""


class LostError(Exception):
    """Ray gave up a task, or lost what it had made."""


@dataclass
class ShardUnderWay:
    """What is known of a shard, by number of the batch."""

    name: str
    batches: tuple["Batch", ...] = ()
    accounts: dict[int, DecodedBatch] = field(default_factory=dict)
    moments: dict[int, "ObjectRef"] = field(default_factory=dict)


@dataclass
class Batch:
    """One VAE batch: it never holds images of two shards."""

    shard: ShardUnderWay
    number: int
    entries: tuple[Entry, ...]
    losses: int = 0

    @property
    def name(self) -> str:
        return f"{self.shard.name}/{self.number}"


@dataclass(frozen=True)
class Decoding:
    """A batch in a decoding task; its pixels are there when the task is done."""

    batch: Batch
    pixels: "ObjectRef"


@dataclass(frozen=True)
class Encoding:
    """A batch that was given to an encoder, by its number, at a time of the monotonic clock."""

    batch: Batch
    pixels: "ObjectRef"
    encoder: int
    since_s: float
    backup: bool


@dataclass(frozen=True)
class Writing:
    """A shard in a writing task."""

    shard: ShardUnderWay


Work = Decoding | Encoding | Writing


@dataclass(frozen=True)
class Stall:
    """Nothing came for STALL_S."""

    waits_for: str


class Flow:
    """All shards of a plan, from listing to storage."""

    def __init__(
        self,
        config: EncodeConfig,
        listing: Listing,
        shards: dict[str, range],
        encoders: "Sequence[ActorHandle]",
        decoders: int,
        runtime: dict[str, str],
        latent_channels: int,
    ) -> None:
        import ray

        self._config, self._encoders, self._decoders = config, encoders, decoders
        self._runtime, self._latent_channels = runtime, latent_channels
        options: dict[str, Any] = {"num_cpus": config.cpus_per_decoder, "max_retries": TASK_RETRIES}
        self._decode: Any = ray.remote(num_returns=2, **options)(read_batch)
        self._write: Any = ray.remote(**options)(write_shard)
        self._fresh = _batches(listing, shards, config.vae_batch)
        self._again: deque[Batch] = deque()
        self._decoded: deque[tuple[Batch, ObjectRef]] = deque()
        self._under_way: dict[ObjectRef, Work] = {}
        self._num_unwritten = len(shards)

    def run(self) -> Iterator[DecodedBatch | ShardRecord | Stall]:
        """Do it all; yields the account of each batch that is through and the record of each shard."""
        import ray

        while self._num_unwritten:
            self._start_decoding()
            self._start_encoding()
            done, _ = ray.wait(list(self._under_way), num_returns=1, timeout=STALL_S)
            if not done:
                yield Stall(
                    f"nothing was finished for {STALL_S:g} s; under way: {self._count(Decoding)} batches in "
                    f"decoders, {self._count(Encoding)} in encoders, {self._count(Writing)} shards to write"
                )
                continue
            work = self._under_way.pop(done[0])
            try:
                yield from self._take(work, done[0])
            except LostError as error:
                self._begin_again(work, error)

    def _take(self, work: Work, done: "ObjectRef") -> Iterator[DecodedBatch | ShardRecord]:
        result = get(done)
        match work:
            case Decoding(batch, pixels):
                batch.shard.accounts[batch.number] = result
                self._decoded.append((batch, pixels))
            case Encoding(batch):
                if batch.number not in batch.shard.moments:  # else another encoder was faster
                    batch.shard.moments[batch.number] = done
                    yield batch.shard.accounts[batch.number]
                    self._start_writing(batch.shard)
            case Writing():
                self._num_unwritten -= 1
                yield result

    def _begin_again(self, work: Work, error: LostError) -> None:
        if isinstance(work, Writing):
            batches: Sequence[Batch] = work.shard.batches
            work.shard.moments.clear()
        else:
            batches = [work.batch]
        for batch in batches:
            batch.losses += 1
            if batch.losses > MAX_LOSSES:
                first, last = batch.entries[0].path, batch.entries[-1].path
                raise DataError(
                    f"the batch of images {first} to {last} was lost {batch.losses} times, the last time: "
                    f"{error}. One of them may kill its decoder, or memory is short: lower decoders or "
                    "vae_batch, or take the image away; finished shards are kept"
                ) from error
        self._again.extend(batches)

    def _start_decoding(self) -> None:
        while (
            self._count(Decoding) < self._decoders
            and len(self._decoded) < BATCHES_PER_ENCODER * len(self._encoders)
            and self._count(Writing) < SHARDS_WRITING
            and (batch := self._next_batch())
        ):
            decode = self._decode.options(name=f"decode {batch.name}")
            pixels, account = decode.remote(self._config.source, batch.entries, self._config.image_size)
            self._under_way[account] = Decoding(batch, pixels)

    def _next_batch(self) -> Batch | None:
        return self._again.popleft() if self._again else next(self._fresh, None)

    def _start_encoding(self) -> None:
        queued = [0] * len(self._encoders)
        for work in self._encodings():
            queued[work.encoder] += 1
        while self._decoded and min(queued) < BATCHES_PER_ENCODER:
            batch, pixels = self._decoded.popleft()
            self._give(batch, pixels, queued)
        long_ago_s = time.monotonic() - BACKUP_S
        for work in self._encodings():
            if work.since_s < long_ago_s and not work.backup and min(queued) == 0:
                self._give(work.batch, work.pixels, queued, backup=True)

    def _give(self, batch: Batch, pixels: "ObjectRef", queued: list[int], backup: bool = False) -> None:
        number = queued.index(min(queued))
        queued[number] += 1
        encode: Any = self._encoders[number].encode.options(name=f"encode {batch.name}")
        moments = encode.remote(pixels, self._runtime)
        self._under_way[moments] = Encoding(batch, pixels, number, time.monotonic(), backup)

    def _start_writing(self, shard: ShardUnderWay) -> None:
        """Send a shard off when its last batch is encoded."""
        if len(shard.moments) < len(shard.batches):
            return
        numbers = range(len(shard.batches))
        task = self._write.options(name=f"write {shard.name}").remote(
            self._config.output,
            shard.name,
            [shard.accounts[number] for number in numbers],
            self._latent_channels,
            *(shard.moments[number] for number in numbers),
        )
        self._under_way[task] = Writing(shard)

    def _encodings(self) -> list[Encoding]:
        return [work for work in self._under_way.values() if isinstance(work, Encoding)]

    def _count(self, kind: type[Work]) -> int:
        return sum(isinstance(work, kind) for work in self._under_way.values())


def _batches(listing: Listing, shards: dict[str, range], size: int) -> Iterator[Batch]:
    for name, rows in shards.items():
        shard = ShardUnderWay(name)
        shard.batches = tuple(
            Batch(shard, number, listing.entries(rows[start : start + size]))
            for number, start in enumerate(range(0, len(rows), size))
        )
        yield from shard.batches


def get(reference: "ObjectRef") -> Any:
    """ray.get; a person's mistake in a worker is raised as it was there, a loss of Ray's as LostError."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, DitScaleError):
            raise error.cause from None
        if isinstance(error.cause, RayError):
            raise LostError(str(error.cause)) from error
        raise
    except RayError as error:
        raise LostError(str(error).strip().partition("\n")[0]) from error
