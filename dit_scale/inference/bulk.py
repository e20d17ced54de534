"""Sampling in bulk: any number of images, on any number of processes that need not know of each other.

    dit-scale sample runs/dit_xl2_256 --images 50000
    deepspeed --num_gpus 8 --no_local_rank --module dit_scale.cli sample runs/dit_xl2_256 --images 50000

There is no process group. Worker r of W computes the batches of tiles whose number modulo W is r and commits
each one to the sample folder. The worker after whose commit nothing is missing assembles the files. What is
committed is never computed again, so a killed job resumes, with any number of workers and any batch.

Shapes: N images of a batch, H W pixels.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from dit_scale import dist, vae, vae_files
from dit_scale.config import EngineConfig
from dit_scale.errors import ConfigError
from dit_scale.inference.protocol import Decoding, protocol_of
from dit_scale.inference.sampling_progress import SamplingProgress
from dit_scale.inference.sources import WeightsSource, build_model
from dit_scale.models.dit import DiT
from dit_scale.sampling.assembly import assemble, has_formats
from dit_scale.sampling.denoise import sample_tile, sampling_schedule
from dit_scale.sampling.labels import LabelChoice
from dit_scale.sampling.sample_folder import DamagedPartError, SampleFolder, claim
from dit_scale.sampling.settings import SamplingSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What to sample, and how. Only `batch`, `formats` and `overwrite` do not affect the pixels."""

    source: WeightsSource
    vae: str
    """Folder or hub name of the VAE that decodes."""
    num_images: int
    labels: LabelChoice
    settings: SamplingSettings
    engine: EngineConfig
    decoding: Decoding = field(default_factory=Decoding)
    batch: int | None = None
    """Images between two commits, rounded up to whole tiles; None: one tile."""
    formats: tuple[str, ...] = ("npz",)
    overwrite: bool = False
    """Whether to replace samples of another protocol."""


@dataclass(frozen=True)
class Worker:
    """One of the processes that share the images."""

    index: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls, node: int = 0, num_nodes: int = 1) -> "Worker":
        """Read RANK and WORLD_SIZE, which a launcher sets, on one of several independent nodes."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if not 0 <= node < num_nodes:
            raise ConfigError(f"--node {node}: expected 0 to {num_nodes - 1} with --nodes {num_nodes}")
        return cls(node * size + rank, num_nodes * size)


def sample_images(request: SampleRequest, out: Path, worker: Worker = Worker()) -> Path | None:
    """Do this worker's share; return `out` if the samples are complete then, else None.

    None means that images of other workers are missing, or that another worker is assembling the files.
    Raises DitScaleError if weights, VAE, classes or steps do not match, or the folder has another protocol.
    """
    job = _Job(request)
    folder = claim(out, job.protocol(), request.overwrite)
    console = Console(stderr=True, markup=False, emoji=False)
    batches = _own_batches(folder, request.batch, worker)
    while not (folder.is_finished() and has_formats(folder, request.formats)):
        if not folder.is_finished():
            job.work(folder, batches, shown=worker.index == 0)
            if not folder.is_finished() and not folder.committed_tiles().all():
                return None
        try:
            if not assemble(folder, job.labels_N, request.formats):
                return None
        except DamagedPartError as error:
            console.print(f"{error}; sampling these images again", highlight=False, soft_wrap=True)
            error.path.unlink(missing_ok=True)
            batches = iter([error.images])
    folder.discard_parts()  # a process may have been killed after it wrote the commit mark
    return out


def _own_batches(folder: SampleFolder, batch: int | None, worker: Worker) -> Iterator[range]:
    """Yield the image numbers of each batch of this worker, without committed tiles."""
    done, tile = folder.committed_tiles(), folder.tile
    tiles_per_batch = 1 if batch is None else -(-batch // tile)
    for first in range(worker.index * tiles_per_batch, folder.num_tiles, worker.count * tiles_per_batch):
        tiles = range(first, min(first + tiles_per_batch, folder.num_tiles))
        for run in _runs([number for number in tiles if not done[number]]):
            yield range(run.start * tile, min(run.stop * tile, folder.num_images))


def _runs(numbers: Sequence[int]) -> Iterator[range]:
    """Split ascending numbers into ranges of consecutive ones."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield range(numbers[start], numbers[i - 1] + 1)
            start = i


class _Job:
    """A request on this process's device; model and decoder are built when there is work."""

    def __init__(self, request: SampleRequest) -> None:
        source, engine = request.source, request.engine
        tile = min(request.settings.tile, request.num_images)
        self.settings = replace(request.settings, tile=tile)
        self.request = request
        self.labels_N = request.labels.labels(
            request.num_images, source.model.num_classes, self.settings.seed
        )
        self.labels: list[int] = self.labels_N.tolist()
        self.device = dist.choose_device(engine.device)
        self.schedule = sampling_schedule(source.timesteps, self.settings, self.device)
        if self.device.type == "cpu":
            dist.compute_on_cpu(engine.cpu_threads)
        self.precision = dist.choose_precision(engine.precision, self.device)

    def protocol(self) -> dict[str, object]:
        """Describe the samples. Raises WeightsError if the VAE did not make the run's latents."""
        request = self.request
        files = vae_files.find_vae(request.vae)
        vae_files.require_weights(files.identity, request.source.vae_sha256)
        return protocol_of(
            request.source,
            files.identity,
            request.decoding,
            num_images=request.num_images,
            labels=request.labels,
            settings=self.settings,
            device=self.device,
            precision=self.precision,
            compiled=request.engine.compile_blocks,
        )

    @cached_property
    def model(self) -> DiT:
        """The model in its precision, on the device."""
        model = build_model(self.request.source, self.device, DTYPES[self.precision])
        if self.request.engine.compile_blocks:
            # A tile has two shapes, with guidance and without: one compilation for each.
            model.compile_blocks(dynamic=False, options=vae.FIXED_CHOICES)
        return model

    @cached_property
    def decoder(self) -> vae.Vae:
        """The VAE, on the device."""
        decoding = self.request.decoding
        return vae.load(
            self.request.vae, self.device, DTYPES[decoding.precision], channels_last=decoding.channels_last
        )

    def work(self, folder: SampleFolder, batches: Iterator[range], shown: bool) -> None:
        """Compute and commit the batches. A thread commits one while the device computes the next."""
        with (
            SamplingProgress(folder.num_images, folder.num_committed, shown) as progress,
            ThreadPoolExecutor(max_workers=1) as writer,
        ):
            pending: Future[None] | None = None
            for images in batches:
                tiles = [
                    self._tile(range(first, min(first + folder.tile, images.stop)), progress)
                    for first in range(images.start, images.stop, folder.tile)
                ]
                if pending is not None:
                    pending.result()
                pending = writer.submit(self._commit, folder, images, tiles)
                progress.commit(len(images))
            if pending is not None:
                pending.result()

    def _tile(self, images: range, progress: SamplingProgress) -> Tensor:
        share = len(images) / len(self.schedule)
        return sample_tile(
            self.model,
            self.decoder,
            self.schedule,
            labels=self.labels,
            images=images,
            settings=self.settings,
            advance=lambda: progress.advance(share),
        )

    def _commit(self, folder: SampleFolder, images: range, tiles: list[Tensor]) -> None:
        # Runs in the writer thread: the copy waits for the device, which already computes the next tile.
        images_NHW3 = np.concatenate([tile.cpu().numpy() for tile in tiles])
        folder.commit(images.start, images_NHW3, self.labels_N[images.start : images.stop])
