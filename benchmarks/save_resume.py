"""Resuming a run, as `benchmarks.save` measures it, and what both need to time an operation."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from dit_scale import dist
from dit_scale.checkpoint import attempts, reader
from dit_scale.checkpoint.partition import Partition
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import TrainConfig
from dit_scale.heartbeat import Heart, Phase
from dit_scale.storage import open_storage
from dit_scale.train import determinism
from dit_scale.train.session import Session

OTHER_WORLD = 3


class RestoreClock(Heart):
    """Notes when the restore starts, by time.perf_counter."""

    def __init__(self, rank: int) -> None:
        self.restore_s = 0.0
        super().__init__(rank)

    def beat(self, phase: Phase, step: int) -> None:
        if phase is Phase.RESTORE and not self.restore_s:
            self.restore_s = time.perf_counter()
        super().beat(phase, step)


def resuming(config: TrainConfig) -> tuple[float, ...]:
    """Return the seconds of the phases of a resume (build, fill, first micro-batch), then of three fills."""
    root = Path(config.run)
    drop_cached(root, Path(config.data.url))
    determinism.pin(config.engine)
    marks = [time.perf_counter()]
    with ExitStack() as stack:
        world = dist.start(config.engine)
        stack.callback(dist.stop)
        clock = RestoreClock(world.rank)
        run = Session(config, world, clock, stack)
        wait(world.device)
        marks += [clock.restore_s, time.perf_counter()]
        next(run.attempt.loader)
        marks.append(time.perf_counter())
        owned = run.trainer.engine.owned
        drop_cached(root)
        cold, cached = (seconds(partial(fill, root, owned)) for _ in range(2))
        other_world = 0.0
        for rank in range(OTHER_WORLD):
            other_world += seconds(partial(fill, root, share_of(owned, rank, OTHER_WORLD)))
    built_s, filled_s, first_batch_s = (b - a for a, b in pairwise(marks))
    return built_s, filled_s, first_batch_s, cold, cached, other_world


def fill(root: Path, owned: Sequence[Partition]) -> None:
    """Read the newest checkpoint of a run into the owners' buffers."""
    storage = open_storage(root)
    found = Checkpoint(storage, attempts.committed(storage)[0])
    reader.fill(owned, owned[0].buffers, found.read)
    wait(next(iter(owned[0].buffers.values())).device)


def share_of(owned: Iterable[Partition], rank: int, world: int) -> tuple[Partition, ...]:
    """Return what a rank would own at another world size: an equal part of each flat buffer."""
    shares = []
    for partition in owned:
        kinds, buffer = tuple(partition.buffers), next(iter(partition.buffers.values()))
        length = -(-buffer.numel() // world)
        begin = rank * length
        slices = []
        for e in partition.slices:
            low, high = max(begin, e.offset), min(begin + length, e.offset + e.length)
            if low < high:
                slices.append(ParameterSlice(e.parameter, e.start + low - e.offset, high - low, low - begin))
        buffers = {kind: torch.empty(length, device=buffer.device).zero_() for kind in kinds}
        shares.append(Partition(buffers, tuple(slices)))
    return tuple(shares)


def drop_cached(*roots: Path) -> None:
    """Drop files, and those in folders, from the page cache, if they were synced."""
    for root in roots:
        for path in (root, *root.rglob("*")):
            if path.is_file():
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
