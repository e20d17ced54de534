"""From positions to tensors: the micro-batches of one rank, read ahead of the training step.

The sequence is a pure function of (data set, seed, batch plan, rank, first step): starting at step
s costs the same for any s. A part that is short of a full micro-batch is filled up with its last
sample at weight 0, so that all ranks run the same shapes.

Shapes: B micro-batch, C latent channels, H and W latent sides.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit_scale import rng
from dit_scale.config import DataConfig
from dit_scale.data.order import sample_ids
from dit_scale.data.plan import BatchPlan
from dit_scale.data.shards import LatentDataset
from dit_scale.rng import Purpose


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


def read_batch(
    dataset: LatentDataset, positions_B: np.ndarray, num_real: int, seed: int, flip: bool
) -> Batch:
    """Read the samples at these positions; those from `num_real` on are fillers."""
    position_B = torch.from_numpy(positions_B)
    views_B = rng.integers(seed, Purpose.VIEW, position_B, 2).numpy() if flip else np.zeros_like(positions_B)
    ids_B = sample_ids(positions_B, len(dataset), seed)
    samples = [dataset.read(int(sample_id)) for sample_id in ids_B]
    moments = np.stack([moments[view] for (moments, _), view in zip(samples, views_B, strict=True)])
    labels = np.array([label for _, label in samples], dtype=np.int64)
    weight_B = (torch.arange(len(positions_B)) < num_real).float()
    return Batch(torch.from_numpy(moments), torch.from_numpy(labels), position_B, weight_B)


def micro_positions(plan: BatchPlan, rank: int, step: int) -> list[tuple[np.ndarray, int]]:
    """The positions of each micro-step of a step, filled up to the micro-batch, and how many are real."""
    mine = plan.rank_samples(rank)
    first = step * plan.global_batch + mine.start
    parts = []
    for start in range(0, plan.micro_steps * plan.micro_batch, plan.micro_batch):
        index = np.arange(start, start + plan.micro_batch, dtype=np.int64)
        num_real = int(np.clip(len(mine) - start, 0, plan.micro_batch))
        parts.append((first + np.minimum(index, len(mine) - 1), num_real))
    return parts


class Loader:
    """An endless iterator over micro-batches from `first_step` on, read by a thread of its own.

    An error in the thread is raised by the `next` that would have returned its batch.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        config: DataConfig,
        plan: BatchPlan,
        rank: int,
        seed: int,
        first_step: int,
    ) -> None:
        self._dataset, self._flip, self._seed = dataset, config.horizontal_flip, seed
        self._plan, self._rank, self._step = plan, rank, first_step
        self._queue: queue.Queue[Batch | Exception] = queue.Queue(maxsize=config.prefetch_batches)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Stop reading ahead and wait for the thread."""
        self._closing.set()
        self._thread.join()

    def _read_ahead(self) -> None:
        step = self._step
        while not self._closing.is_set():
            for positions_B, num_real in micro_positions(self._plan, self._rank, step):
                try:
                    item: Batch | Exception = read_batch(
                        self._dataset, positions_B, num_real, self._seed, self._flip
                    )
                except Exception as error:  # handed to the consumer, who raises it
                    item = error
                self._put(item)
            step += 1

    def _put(self, item: Batch | Exception) -> None:
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return
