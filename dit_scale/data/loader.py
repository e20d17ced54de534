"""From positions to tensors: the micro-batches of one rank, read ahead of the training step.

The sequence is a pure function of the data set, seed, window, held-out samples, excluded positions, batch
plan, rank and first step; starting at any step costs the same. The last micro-batch of a step is padded with
its last sample at weight 0, so that all ranks have the same shapes. A damaged sample stops the run or is
replaced, as configured; a storage that does not answer stops it.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dit_scale.config import DataConfig
from dit_scale.data.batch_plan import BatchPlan
from dit_scale.data.download import Downloader
from dit_scale.data.held_out import Mask
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.data.order import I64, Order, Ranges, positions_of
from dit_scale.data.prefetch import Prefetch
from dit_scale.data.quarantine import Quarantine
from dit_scale.data.sample_reader import SampleReader
from dit_scale.data.shards import LatentDataset
from dit_scale.errors import ConfigError, DataError

BLOCK_SAMPLES = 4096
"""Samples whose ids and views are computed together: the overhead per call dominates for a few."""
CLOSE_S = 10.0
"""Longest wait for the threads at the end; a thread that still waits for a storage is left behind."""


@dataclass(frozen=True)
class RankPositions:
    """The positions that a rank reads, from `first_step` on."""

    plan: BatchPlan
    rank: int
    first_step: int
    excluded: Ranges

    def of_rank(self, first_step: int, num_steps: int) -> I64:
        """Return the positions of these steps, (steps, micro-steps, micro-batch)."""
        return positions_of(self.plan.indices(self.rank, first_step, num_steps), self.excluded)

    def of_step(self, step: int) -> I64:
        """Return the positions of a step on all ranks, (global_batch,)."""
        indices = step * self.plan.global_batch + np.arange(self.plan.global_batch)
        return positions_of(indices, self.excluded)


class Loader:
    """An endless iterator over micro-batches from `first_step` on, read by its own thread.

    `excluded` are positions that the run skips, `quarantined` ids of samples known to be damaged, `held_out`
    is true for the ids that it never reads.
    An error in the thread is raised by the `next` that would have returned its micro-batch, and by every
    `next` after it.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        config: DataConfig,
        plan: BatchPlan,
        *,
        rank: int,
        seed: int,
        first_step: int,
        excluded: Ranges = (),
        quarantined: Iterable[int] = (),
        held_out: Mask | None = None,
    ) -> None:
        info = dataset.info
        if config.horizontal_flip and info.latent_shape[0] < 2:
            raise ConfigError(f"{config.url} has no mirrored views: set data.horizontal_flip=false")
        self._dataset, self._deadline_s = dataset, config.deadline_s
        self._positions = RankPositions(plan, rank, first_step, excluded)
        sizes = [shard.samples for shard in info.shards]
        order = Order(info.samples, seed, sizes, config.window_shards, held_out)
        quarantine = Quarantine(info.samples, quarantined, config.damaged, held_out)
        self._reader = SampleReader(dataset, order, seed, config.horizontal_flip, quarantine)
        self._notes: deque[str] = deque()
        self._downloader = None
        if dataset.files.is_remote:
            self._check_budget(config.window_shards)
            self._downloader = Downloader(dataset.files, self._notes.append)
        self._num_taken = 0
        self._error: Exception | None = None
        self._patience_s = CLOSE_S
        self.waited_s = 0.0
        """Total time spent waiting for micro-batches."""
        self._prefetch = Prefetch(self._read(), config.prefetch_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        if self._error is not None:
            raise self._error
        start_s = time.monotonic()
        try:
            batch = self._prefetch.next(self._deadline_s)
            if batch is None:
                self._patience_s = 0.0  # the thread has used up its time already
                raise DataError(self._overdue())
        except Exception as error:
            self._error = error
            raise
        finally:
            self.waited_s += time.monotonic() - start_s
        self._num_taken += 1
        return batch

    def sample_ids(self, step: int, damaged: Iterable[int] = ()) -> I64:
        """Return the ids of all samples of a step, on all ranks, int64 (global_batch,).

        `damaged` are samples that other ranks replace; this loader may not have met them.
        """
        ids = self._reader.order.ids(self._positions.of_step(step))
        return self._reader.quarantine.replace(ids, damaged)

    def quarantined(self) -> dict[int, str]:
        """Return the damaged samples that this loader has replaced: sample id => reason."""
        return self._reader.quarantine.found()

    def notes(self) -> list[str]:
        """Return the messages about the cache since the last call; each is reported once."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def close(self) -> None:
        """Stop reading ahead and wait for the threads, unless a storage keeps them waiting."""
        self._prefetch.stop()
        if self._downloader is not None:
            self._downloader.close(self._patience_s)
        self._prefetch.join(self._patience_s)

    def _read(self) -> Iterator[MicroBatch]:
        plan = self._positions.plan
        num_real = plan.num_real(self._positions.rank)
        num_steps = max(1, BLOCK_SAMPLES // (plan.micro_steps * plan.micro_batch))
        step = self._positions.first_step
        while True:
            positions = self._positions.of_rank(step, num_steps)
            ids, views = self._reader.draws(positions)
            for at in np.ndindex(num_steps, plan.micro_steps):
                self._fetch_ahead(int(positions[at][0]))
                yield self._reader.micro_batch(positions[at], ids[at], views[at], num_real[at[1]])
            step += num_steps

    def _fetch_ahead(self, position: int) -> None:
        if self._downloader is not None:
            shards = self._reader.order.shards_ahead(position)
            if self._downloader.want(shards):
                self._dataset.files.close_others(shards)

    def _overdue(self) -> str:
        step, micro_step = divmod(self._num_taken, self._positions.plan.micro_steps)
        return (
            f"step {self._positions.first_step + step}, micro-batch {micro_step}: not read within "
            f"data.deadline_s={self._deadline_s:g} s; waiting for "
            f"{self._dataset.waits_for() or 'the loader itself'}. Does {self._dataset.storage.url} answer?"
        )

    def _check_budget(self, window_shards: int) -> None:
        limit = self._dataset.cache.limit_bytes
        largest = sorted((shard.bytes for shard in self._dataset.info.shards), reverse=True)
        need = sum(largest[: 2 * window_shards])
        if limit and need > limit:
            self._notes.append(
                f"data.cache_bytes={limit} is too small for two windows of {window_shards} shards ({need} "
                "bytes): some samples will be read from the storage one by one; raise it or lower "
                "data.window_shards"
            )
