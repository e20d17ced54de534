"""From positions to tensors: the micro-batches of one rank, read ahead of the training step.

The sequence is a pure function of (data set, seed, window, excluded positions, batch plan, rank, first
step): starting at step s costs the same for any s. A part that is short of a full micro-batch is
filled up with its last sample at weight 0, so that all ranks run the same shapes. A sample that is
damaged for good ends the run or is replaced, as configured; a place that does not answer ends it.

Shapes: B micro-batch, C latent channels, H and W latent sides.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_scale import rng
from dit_scale.config import DataConfig
from dit_scale.data.batch_plan import BatchPlan
from dit_scale.data.download import Downloader
from dit_scale.data.order import Order, Ranges, positions_of
from dit_scale.data.quarantine import Quarantine
from dit_scale.data.shards import LATENT_DTYPE, LatentDataset
from dit_scale.errors import ConfigError, DataError
from dit_scale.rng import Purpose

BLOCK_SAMPLES = 4096
"""Samples whose ids and views are computed at once: for a few, most of the time is overhead."""
CLOSE_S = 10.0
"""Longest wait for the threads at the end; one that a storage keeps waiting is left behind."""

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank."""

    moments_B2CHW: Tensor
    """Posterior mean (first C channels) and std of the drawn view, unscaled, fp16."""
    y_B: Tensor
    """Class labels, int64."""
    position_B: Tensor
    """Global positions, int64: the key of every draw made for these samples."""
    weight_B: Tensor
    """1 for a sample of this step, 0 for a filler, fp32."""

    def to(self, device: torch.device) -> "Batch":
        """Copy to the device without waiting for it."""

        def move(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        return Batch(move(self.moments_B2CHW), move(self.y_B), move(self.position_B), move(self.weight_B))


def draw_latents(batch: Batch, seed: int, scale: float) -> Tensor:
    """z_BCHW = scale * (mean + std * noise), fp32: one draw from each sample's VAE posterior."""
    mean_BCHW, std_BCHW = batch.moments_B2CHW.float().chunk(2, dim=1)
    noise_BCHW = rng.normals(seed, Purpose.POSTERIOR, batch.position_B, tuple(mean_BCHW.shape[1:]))
    return (mean_BCHW + std_BCHW * noise_BCHW) * scale


class Reader:
    """Reads what belongs to given positions of a run."""

    def __init__(
        self, dataset: LatentDataset, order: Order, seed: int, flip: bool, quarantine: Quarantine
    ) -> None:
        self._dataset, self._order, self._seed = dataset, order, seed
        self._num_views = 2 if flip else 1
        self._quarantine = quarantine

    def draws(self, positions: I64) -> tuple[I64, I64]:
        """Sample id and view at each position, of the same shape."""
        flat = torch.from_numpy(positions.reshape(-1))
        views = rng.integers(self._seed, Purpose.VIEW, flat, self._num_views).numpy()
        return self._order.ids(positions), views.reshape(positions.shape)

    def batch(self, positions_B: I64, ids_B: I64, views_B: I64, num_real: int) -> Batch:
        """The samples with these ids; those from `num_real` on are fillers."""
        moments_B2CHW, labels_B = self._read(ids_B, views_B)
        return Batch(
            torch.from_numpy(moments_B2CHW),
            torch.from_numpy(labels_B),
            torch.from_numpy(positions_B),
            (torch.arange(len(positions_B)) < num_real).float(),
        )

    def _read(self, ids_B: I64, views_B: I64) -> tuple[NDArray[np.float16], I64]:
        """Moments and labels, damaged samples replaced."""
        ids_B = self._quarantine.replace(ids_B)
        moments_B2CHW = np.empty((len(ids_B), *self._dataset.info.latent_shape[1:]), LATENT_DTYPE)
        labels_B, damaged = self._dataset.read_views(ids_B, views_B, moments_B2CHW)
        if damaged:
            self._quarantine.add(damaged)
            rows = np.isin(ids_B, list(damaged))
            moments_B2CHW[rows], labels_B[rows] = self._read(ids_B[rows], views_B[rows])
        return moments_B2CHW, labels_B


def read_batch(dataset: LatentDataset, positions_B: I64, num_real: int, seed: int, flip: bool) -> Batch:
    """The micro-batch at these positions of a run without windows, as a Loader gives it out."""
    quarantine = Quarantine(len(dataset), (), "stop")
    reader = Reader(dataset, Order(len(dataset), seed), seed, flip, quarantine)
    return reader.batch(positions_B, *reader.draws(positions_B), num_real)


class Loader:
    """An endless iterator over micro-batches from `first_step` on, read by a thread of its own.

    `excluded` are positions that the run leaves out, `quarantined` sample ids known to be damaged.
    An error in the thread is raised by the `next` that would have returned its batch, and from then on.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        config: DataConfig,
        plan: BatchPlan,
        rank: int,
        seed: int,
        first_step: int,
        excluded: Ranges = (),
        quarantined: Iterable[int] = (),
    ) -> None:
        info = dataset.info
        if config.horizontal_flip and info.latent_shape[0] < 2:
            raise ConfigError(f"{config.url} has no mirrored views: set data.horizontal_flip=false")
        self._dataset, self._plan, self._rank, self._excluded = dataset, plan, rank, excluded
        self._step, self._taken, self._deadline_s = first_step, 0, config.deadline_s
        sizes = [shard.samples for shard in info.shards]
        self._order = Order(info.samples, seed, sizes, config.window_shards)
        self._quarantine = Quarantine(info.samples, quarantined, config.damaged)
        self._reader = Reader(dataset, self._order, seed, config.horizontal_flip, self._quarantine)
        self._notes: deque[str] = deque()
        self._downloader = None
        if dataset.files.is_remote:
            self._check_budget(config.window_shards)
            self._downloader = Downloader(dataset.files, self._notes.append)
        self._queue: queue.Queue[Batch | Exception] = queue.Queue(maxsize=config.prefetch_batches)
        self._error: Exception | None = None
        self.waited_s = 0.0
        """How long batches were waited for, all in all."""
        self._closing, self._patience_s = threading.Event(), CLOSE_S
        self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._error is None:
            begin_s = time.monotonic()
            try:
                item = self._queue.get(timeout=self._deadline_s)
            except queue.Empty:
                item = DataError(self._overdue())
                self._patience_s = 0.0  # what was waited for so long is not waited for once more at the end
            self.waited_s += time.monotonic() - begin_s
            if not isinstance(item, Exception):
                self._taken += 1
                return item
            self._error = item
        raise self._error

    def sample_ids(self, step: int) -> I64:
        """The ids of the samples of a whole step, of all ranks, int64 (global_batch,)."""
        indices = step * self._plan.global_batch + np.arange(self._plan.global_batch)
        return self._quarantine.replace(self._order.ids(positions_of(indices, self._excluded)))

    def quarantined(self) -> dict[int, str]:
        """Damaged samples that this loader found and replaced so far: sample id => reason."""
        return self._quarantine.found()

    def notes(self) -> list[str]:
        """What a person should know about the cache, each thing once: messages since the last call."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def close(self) -> None:
        """Stop reading ahead and wait for the threads, unless a storage keeps them waiting."""
        self._closing.set()
        if self._downloader is not None:
            self._downloader.close(self._patience_s)
        self._thread.join(self._patience_s)

    def _read_ahead(self) -> None:
        plan = self._plan
        num_real = plan.num_real(self._rank)
        num_steps = max(1, BLOCK_SAMPLES // (plan.micro_steps * plan.micro_batch))
        step = self._step
        try:
            while True:
                indices = plan.indices(self._rank, step, num_steps)
                positions = positions_of(indices, self._excluded)
                ids, views = self._reader.draws(positions)
                for at in np.ndindex(num_steps, plan.micro_steps):
                    self._fetch_ahead(int(positions[at][0]))
                    batch = self._reader.batch(positions[at], ids[at], views[at], num_real[at[1]])
                    if not self._put(batch):
                        return
                step += num_steps
        except Exception as error:  # handed to the consumer, who raises it
            self._put(error)

    def _fetch_ahead(self, position: int) -> None:
        if self._downloader is not None:
            shards = self._order.shards_ahead(position)
            if self._downloader.want(shards):
                self._dataset.files.close_others(shards)

    def _put(self, item: Batch | Exception) -> bool:
        """Whether it was put: False once the loader is closed."""
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _overdue(self) -> str:
        step, micro_step = divmod(self._taken, self._plan.micro_steps)
        return (
            f"step {self._step + step}, micro-batch {micro_step}: not read within data.deadline_s="
            f"{self._deadline_s:g} s; waiting for {self._dataset.waits_for() or 'the loader itself'}. "
            f"Does {self._dataset.storage.url} answer?"
        )

    def _check_budget(self, window_shards: int) -> None:
        limit = self._dataset.cache.limit_bytes
        largest = sorted((shard.bytes for shard in self._dataset.info.shards), reverse=True)
        need = sum(largest[: 2 * window_shards])
        if limit and need > limit:
            self._notes.append(
                f"data.cache_bytes={limit} does not hold two windows of {window_shards} shards ({need} B): "
                "some samples will be read one by one from the storage; raise it or lower data.window_shards"
            )
