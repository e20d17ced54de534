"""Batches on their way through Ray: decoding tasks, encoder actors, writing tasks.

The number of decoders and encoders bounds what is in flight, not the size of the input, so memory use is
constant. Work that Ray loses (a killed process, a dead node) is repeated. A shard is a pure function of its
slice of the listing, so it does not matter how often or where it is made.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_scale.config import EncodeConfig
from dit_scale.errors import DitScaleError
from dit_scale_pipeline.decoder import DecodedBatch, read_batch
from dit_scale_pipeline.encoder_pool import BATCHES_PER_ENCODER, EncoderPool
from dit_scale_pipeline.inputs import Listing
from dit_scale_pipeline.ray_cluster import LostError, get
from dit_scale_pipeline.shards_writer import ShardRecord, write_shard
from dit_scale_pipeline.tasks import (
    BatchQueue,
    DecodeTask,
    EncodeBatch,
    EncodeTask,
    LoadTask,
    PendingShard,
    Task,
    TasksInFlight,
    WriteTask,
)

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

MAX_WRITES = 2
"""Shards written in parallel; decoding pauses while that many are being written."""
TASK_RETRIES = 3
"""Retries by Ray of a task whose process died."""
STALL_S = 30.0
"""Time without any result after which the job reports a stall."""


@dataclass(frozen=True)
class Stall:
    """An event that delays the job: no result for STALL_S, or lost work."""

    reason: str


class Flow:
    """Moves the shards of a plan from the listing to storage."""

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

        self._config, self._listing = config, listing
        self._num_decoders, self._latent_channels = num_decoders, latent_channels
        options: dict[str, Any] = {"num_cpus": config.cpus_per_decoder, "max_retries": TASK_RETRIES}
        # One name per kind of task: the dashboard groups by name, and Ray keeps statistics for each name.
        self._decode: Any = ray.remote(num_returns=2, **options)(read_batch).options(name="decode")
        self._write: Any = ray.remote(**options)(write_shard).options(name="write")
        self._waiting = BatchQueue(listing, shards, config.vae_batch)
        self._decoded: deque[tuple[EncodeBatch, ObjectRef]] = deque()
        self._tasks = TasksInFlight()
        self._encoders = EncoderPool(config, encoders, runtime, self._tasks)
        self._num_unwritten = len(shards)

    def run(self) -> Iterator[DecodedBatch | ShardRecord | Stall]:
        """Encode all shards; yield each batch when it is encoded and the record of each shard."""
        import ray
        from ray.exceptions import RayTaskError

        while self._num_unwritten:
            self._start_decoding()
            self._start_encoding()
            done, _ = ray.wait(self._tasks.results(), num_returns=1, timeout=STALL_S)
            if not done:
                yield self._stall()
                yield from self._make_room()
                continue
            task = self._tasks.pop(done[0])
            try:
                yield from self._take(task, done[0])
            except LostError as error:
                yield from self._retry(task, error)
            except (DitScaleError, RayTaskError) as error:
                if not isinstance(task, LoadTask | EncodeTask):
                    raise
                yield from self._retry(task, error)  # may be the fault of one node

    def _take(self, task: Task, result: "ObjectRef") -> Iterator[DecodedBatch | ShardRecord]:
        value = get(result)
        match task:
            case DecodeTask(batch, pixels):
                batch.shard.decoded[batch.number] = value
                self._decoded.append((batch, pixels))
            case EncodeTask(batch):
                if batch.number not in batch.shard.moments:  # otherwise another encoder was faster
                    batch.shard.moments[batch.number] = result
                    yield batch.shard.decoded[batch.number]
                    self._start_writing(batch.shard)
            case WriteTask():
                self._num_unwritten -= 1
                yield value
            case LoadTask(encoder):
                self._encoders.mark_ready(encoder, value)

    def _retry(self, task: Task, error: Exception) -> Iterator[Stall]:
        """Repeat lost work, on another node if possible; raise when it has failed too often."""
        match task:
            case LoadTask(encoder, failures):
                yield Stall(f"encoder {encoder} is not ready: {_last_line(error)}")
                self._encoders.load_failed(encoder, failures + 1, error)
                return
            case EncodeTask(batch, encoder=encoder):
                batches: Sequence[EncodeBatch] = [batch]
                self._encoders.batch_failed(encoder, error)
            case DecodeTask(batch):
                batches = [batch]
            case WriteTask(shard):
                batches = shard.batches
                shard.moments.clear()
        yield Stall(f"repeating lost work of shard {batches[0].shard.name}: {_last_line(error)}")
        for batch in batches:
            self._waiting.retry(batch, error)

    def _stall(self) -> Stall:
        count = self._tasks.count
        return Stall(
            f"no result for {STALL_S:g} s; in flight: {count(DecodeTask)} batches in decoders, "
            f"{count(EncodeTask)} in encoders, {count(WriteTask)} shards being written; "
            f"{self._encoders.num_ready} of {len(self._encoders)} encoders are ready"
        )

    def _make_room(self) -> Iterator[Stall]:
        """Drop encoders that occupy all room of the decoders after the loss of a node."""
        if count := self._encoders.num_to_drop():
            yield Stall(f"stopping {count} encoders: the remaining nodes have no room for a decoder")
            self._encoders.drop(count)

    def _start_decoding(self) -> None:
        while (
            self._tasks.count(DecodeTask) < self._num_decoders
            and len(self._decoded) < BATCHES_PER_ENCODER * len(self._encoders)
            and self._tasks.count(WriteTask) < MAX_WRITES
            and (batch := self._waiting.pop())
        ):
            pixels, decoded = self._decode.remote(
                self._config.source,
                self._listing.kind,
                batch.entries,
                self._config.image_size,
                self._listing.columns,
            )
            self._tasks.add(decoded, DecodeTask(batch, pixels))

    def _start_encoding(self) -> None:
        while self._decoded and self._encoders.free_slots():
            self._encoders.submit(*self._decoded.popleft())
        self._encoders.submit_backups()

    def _start_writing(self, shard: PendingShard) -> None:
        """Start writing a shard when all its batches are encoded."""
        if len(shard.moments) < len(shard.batches):
            return
        numbers = range(len(shard.batches))
        task = self._write.remote(
            self._config.output,
            shard.name,
            [shard.decoded[number] for number in numbers],
            self._latent_channels,
            *(shard.moments[number] for number in numbers),
        )
        self._tasks.add(task, WriteTask(shard))


def _last_line(error: Exception) -> str:
    """Return the last line of an error, where the traceback of a worker has the message."""
    return str(error).strip().splitlines()[-1]
