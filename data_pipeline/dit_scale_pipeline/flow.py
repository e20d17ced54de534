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

from dit_scale.config import EncodeConfig
from dit_scale.errors import DataError, DeviceError, DitScaleError
from dit_scale_pipeline.decoder import DecodedBatch, read_batch
from dit_scale_pipeline.inputs import Entry, Listing
from dit_scale_pipeline.ray_cluster import LostError, get, living_nodes, max_encoders
from dit_scale_pipeline.shards_writer import ShardRecord, write_shard

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
"""Times that a batch is begun again after it was lost; more is an image that kills whoever takes it."""
MAX_LOADS = 5
"""Times in a row that an encoder's VAE is loaded again, each time in a new process."""
BACKUP_S = 120.0
"""Time after which a batch is also given to an encoder that has nothing to do: the first may be gone."""
STALL_S = 30.0
"""Time without any result after which a person hears of it."""


@dataclass
class ShardUnderWay:
    """What is known of a shard, by number of the batch."""

    name: str
    batches: tuple["EncodeBatch", ...] = ()
    accounts: dict[int, DecodedBatch] = field(default_factory=dict)
    moments: dict[int, "ObjectRef"] = field(default_factory=dict)


@dataclass
class EncodeBatch:
    """One VAE batch: it never holds images of two shards."""

    shard: ShardUnderWay
    number: int
    entries: tuple[Entry, ...]
    losses: int = 0


@dataclass(frozen=True)
class Decoding:
    """A batch in a decoding task; its pixels are there when the task is done."""

    batch: EncodeBatch
    pixels: "ObjectRef"


@dataclass(frozen=True)
class Encoding:
    """A batch that was given to an encoder, by its number, at a time of the monotonic clock."""

    batch: EncodeBatch
    pixels: "ObjectRef"
    encoder: int
    since_s: float
    backup: bool


@dataclass(frozen=True)
class Writing:
    """A shard in a writing task."""

    shard: ShardUnderWay


@dataclass(frozen=True)
class Loading:
    """An encoder that loads its VAE, at first or after its process died; meanwhile it gets no batch."""

    encoder: int
    failures: int = 0
    """Times in a row that it did not succeed."""


Work = Decoding | Encoding | Writing | Loading


@dataclass(frozen=True)
class Stall:
    """Something that holds the work up: nothing came for STALL_S, or what was under way is lost."""

    waits_for: str


class Flow:
    """All shards of a plan, from listing to storage."""

    def __init__(
        self,
        config: EncodeConfig,
        listing: Listing,
        *,
        shards: dict[str, range],
        encoders: "Sequence[ActorHandle]",
        num_decoders: int,
        runtime: dict[str, str],
        latent_channels: int,
    ) -> None:
        import ray

        self._config, self._encoders, self._decoders = config, encoders, num_decoders
        self._runtime, self._latent_channels = runtime, latent_channels
        options: dict[str, Any] = {"num_cpus": config.cpus_per_decoder, "max_retries": TASK_RETRIES}
        # One name for all tasks of a kind: the dashboard groups by names, and Ray keeps an account of each.
        self._decode: Any = ray.remote(num_returns=2, **options)(read_batch).options(name="decode")
        self._write: Any = ray.remote(**options)(write_shard).options(name="write")
        self._kind, self._columns = listing.kind, listing.columns
        self._fresh = _batches(listing, shards, config.vae_batch)
        self._again: deque[EncodeBatch] = deque()
        self._decoded: deque[tuple[EncodeBatch, ObjectRef]] = deque()
        self._under_way: dict[ObjectRef, Work] = {}
        self._num_unwritten = len(shards)
        self._ready: set[int] = set()
        for number in range(len(encoders)):
            self._load(number)

    def run(self) -> Iterator[DecodedBatch | ShardRecord | Stall]:
        """Do it all; yields the account of each batch that is through and the record of each shard."""
        import ray
        from ray.exceptions import RayTaskError

        while self._num_unwritten:
            self._start_decoding()
            self._start_encoding()
            done, _ = ray.wait(list(self._under_way), num_returns=1, timeout=STALL_S)
            if not done:
                yield Stall(
                    f"nothing was finished for {STALL_S:g} s; under way: {self._count(Decoding)} batches in "
                    f"decoders, {self._count(Encoding)} in encoders, {self._count(Writing)} shards to write; "
                    f"{len(self._ready)} of {len(self._encoders)} encoders are ready"
                )
                yield from self._make_room()
                continue
            work = self._under_way.pop(done[0])
            try:
                yield from self._take(work, done[0])
            except LostError as error:
                yield from self._begin_again(work, error)
            except (DitScaleError, RayTaskError) as error:
                if not isinstance(work, Loading | Encoding):
                    raise
                yield from self._begin_again(work, error)  # the fault of one node, as it may be

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
            case Loading(encoder):
                if result != self._runtime:
                    raise DeviceError(
                        f"an encoder runs on another kind of machine: {result}, the data set is made on "
                        f"{self._runtime}"
                    )
                self._ready.add(encoder)

    def _begin_again(self, work: Work, error: Exception) -> Iterator[Stall]:
        """Do what is lost once more, elsewhere if possible; raises when that was tried often enough."""
        match work:
            case Loading(encoder, failures):
                yield Stall(f"encoder {encoder} is not ready: {_brief(error)}")
                self._load_again(encoder, failures + 1, error)
                return
            case Encoding(batch, encoder=encoder):
                batches: Sequence[EncodeBatch] = [batch]
                if encoder in self._ready:
                    self._ready.remove(encoder)
                    if isinstance(error, LostError):
                        self._load(encoder)
                    else:  # after an error of CUDA a process is good for nothing
                        self._load_again(encoder, 1, error)
            case Decoding(batch):
                batches = [batch]
            case Writing(shard):
                batches = shard.batches
                shard.moments.clear()
        yield Stall(f"a part of shard {batches[0].shard.name} is made again: {_brief(error)}")
        for batch in batches:
            self._count_loss(batch, error)
        self._again.extend(batches)

    def _count_loss(self, batch: EncodeBatch, error: Exception) -> None:
        batch.losses += 1
        if batch.losses <= MAX_LOSSES:
            return
        if not isinstance(error, LostError):
            raise error
        raise DataError(
            f"the batch of images {batch.entries[0].path} to {batch.entries[-1].path} was lost "
            f"{batch.losses} times, the last time: {error}. One of them may kill its decoder, or memory is "
            "short: lower decoders or vae_batch, or take the image away; finished shards are kept"
        ) from error

    def _load(self, encoder: int, failures: int = 0) -> None:
        """Have an encoder say that its VAE is there; Ray brings its process back where there is room."""
        self._under_way[self._encoders[encoder].runtime.remote()] = Loading(encoder, failures)

    def _load_again(self, encoder: int, failures: int, error: Exception) -> None:
        """A new process may succeed, also on another node; after MAX_LOADS the others go on without it."""
        import ray

        if failures <= MAX_LOADS:
            ray.kill(self._encoders[encoder], no_restart=False)
            self._load(encoder, failures)
        elif not self._ready and not self._count(Loading):
            raise error

    def _make_room(self) -> Iterator[Stall]:
        """Give up encoders that, after the loss of a node, have taken all room of the decoders."""
        import ray

        loading = {ref: work.encoder for ref, work in self._under_way.items() if isinstance(work, Loading)}
        # Those without a place come first: they would take the room again.
        encoders = [*sorted(self._ready), *loading.values()]
        device = "cpu" if self._runtime["device"].startswith("cpu") else "cuda"
        most = max(1, max_encoders(self._config, device, living_nodes()))
        if self._encodings() or len(encoders) <= most:
            return
        yield Stall(
            f"the nodes that are left have room for {most} of {len(encoders)} encoders; the others end"
        )
        for number in encoders[most:]:
            ray.kill(self._encoders[number], no_restart=True)
            self._ready.discard(number)
        for ref, number in loading.items():
            if number in encoders[most:]:
                del self._under_way[ref]

    def _start_decoding(self) -> None:
        while (
            self._count(Decoding) < self._decoders
            and len(self._decoded) < BATCHES_PER_ENCODER * len(self._encoders)
            and self._count(Writing) < SHARDS_WRITING
            and (batch := self._next_batch())
        ):
            pixels, account = self._decode.remote(
                self._config.source,
                self._kind,
                batch.entries,
                self._config.image_size,
                self._columns,
            )
            self._under_way[account] = Decoding(batch, pixels)

    def _next_batch(self) -> EncodeBatch | None:
        return self._again.popleft() if self._again else next(self._fresh, None)

    def _start_encoding(self) -> None:
        if not self._ready:
            return
        queued = dict.fromkeys(sorted(self._ready), 0)
        for work in self._encodings():
            if work.encoder in queued:
                queued[work.encoder] += 1
        while self._decoded and min(queued.values()) < BATCHES_PER_ENCODER:
            batch, pixels = self._decoded.popleft()
            self._give(batch, pixels, queued)
        long_ago_s = time.monotonic() - BACKUP_S
        for work in self._encodings():
            if work.since_s < long_ago_s and not work.backup and min(queued.values()) == 0:
                self._give(work.batch, work.pixels, queued, backup=True)

    def _give(
        self, batch: EncodeBatch, pixels: "ObjectRef", queued: dict[int, int], backup: bool = False
    ) -> None:
        number = min(queued, key=lambda encoder: queued[encoder])
        queued[number] += 1
        # Ray would try it again in the same actor, which may find no room any more.
        encode: Any = self._encoders[number].encode.options(name="encode", max_task_retries=0)
        moments = encode.remote(pixels, self._runtime)
        self._under_way[moments] = Encoding(batch, pixels, number, time.monotonic(), backup)

    def _start_writing(self, shard: ShardUnderWay) -> None:
        """Send a shard off when its last batch is encoded."""
        if len(shard.moments) < len(shard.batches):
            return
        numbers = range(len(shard.batches))
        task = self._write.remote(
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


def _batches(listing: Listing, shards: dict[str, range], size: int) -> Iterator[EncodeBatch]:
    for name, rows in shards.items():
        shard = ShardUnderWay(name)
        shard.batches = tuple(
            EncodeBatch(shard, number, listing.entries(rows[start : start + size]))
            for number, start in enumerate(range(0, len(rows), size))
        )
        yield from shard.batches


def _brief(error: Exception) -> str:
    """One line of an error; that of a worker's exception is its last."""
    return str(error).strip().splitlines()[-1]
