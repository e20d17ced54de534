"""Saving the same state as `torch.save` and `torch.distributed.checkpoint` do, next to ours.

The others have a process of their own with default settings, because ours changes how its process gets
memory (dit_scale/host_memory.py). Their state is read from a checkpoint of ours: a dictionary of kinds of
state, each a dictionary of tensors by parameter, as a training loop passes it to them. Every method takes
its turn in every round, on a disk that is idle. Old checkpoints are deleted between the turns.

- `torch.save`: the call blocks the loop. It does not sync the file; the benchmark does, and counts that as
  part of the time until the checkpoint is durable.
- `async_save`: the call copies the state to new host memory; a thread then writes and syncs the files.
- `async_save, kept`: the same with one stager for all saves, which keeps its host memory.
"""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.save_resume import drop_cached, fill, seconds, wait
from dit_scale.checkpoint import attempts, retention
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.storage import open_storage
from dit_scale.train.session import Session

OURS = "dit-scale"
OTHERS = ("torch.save", "async_save", "async_save, kept")

Row = dict[str, Any]


class Others:
    """The state of a run, and what saves it. One per process."""

    def __init__(self, root: Path, device: torch.device) -> None:
        """Read the newest checkpoint of the run in `root`."""
        storage = open_storage(root)
        found = Checkpoint(storage, attempts.committed(storage)[0])
        self.device = device
        self.state = {
            kind: {name: tensor.to(device) for name, tensor in found.read_whole(kind).items()}
            for kind in sorted(found.kinds())
        }
        on_cuda = device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_cuda,
            )
        )

    def save(self, method: str, path: Path) -> tuple[float, float, float]:
        """Return the seconds for which the loop waits, those until all is synced, and those of CPU time."""
        os.sync()
        start, cpu_start = time.perf_counter(), time.process_time()
        if method == "torch.save":
            torch.save(self.state, path)
            stall_s = time.perf_counter() - start
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            stager = self._stager if method == "async_save, kept" else None
            saved = dcp.async_save(self.state, checkpoint_id=path, async_stager=stager)
            stall_s = time.perf_counter() - start
            assert isinstance(saved, Future), "no staging in the background was asked for"
            saved.result()
        return stall_s, time.perf_counter() - start, time.process_time() - cpu_start

    def load(self, method: str, path: Path) -> None:
        """Read the state back into its tensors."""
        if method == "torch.save":
            stored = torch.load(path, map_location=self.device, weights_only=True)
            for kind, tensors in self.state.items():
                for name, tensor in tensors.items():
                    tensor.copy_(stored[kind][name])
        else:
            dcp.load(self.state, checkpoint_id=path)
        wait(self.device)


def compare(
    run: Session, advance: Callable[[], object], others: ProcessPoolExecutor, folder: Path, rounds: int
) -> list[Row]:
    """Save and load with every method in turn. `advance` trains a step, because a step is saved only once."""
    root, owned = Path(run.config.run), run.trainer.engine.owned
    paths = {method: folder / f"other-{i}" for i, method in enumerate(OTHERS)}
    times: dict[str, list[tuple[float, ...]]] = {method: [] for method in (OURS, *OTHERS)}
    device = next(iter(owned[0].buffers.values())).device
    others.submit(_start, root, device).result()
    storage, attempt = open_storage(root), run.attempt.record.number
    for _ in range(1 + rounds):
        advance()
        for old in attempts.committed(storage):  # else retention would, between the commit and the reply
            retention.delete(storage, attempt, old.path())
        os.sync()
        start, cpu_start = time.perf_counter(), time.process_time()
        stall_s = seconds(run.saves.save)
        run.saves.wait()
        saved = stall_s, time.perf_counter() - start, time.process_time() - cpu_start
        drop_cached(root)
        times[OURS].append((*saved, *(seconds(partial(fill, root, owned)) for _ in range(2))))
        for method, path in paths.items():
            times[method].append(others.submit(_turn, method, path).result())
            _remove(path)
    state_bytes = run.saver.snapshot.bytes
    return [_row(method, found[1:], state_bytes) for method, found in times.items()]


def _row(method: str, times: list[tuple[float, ...]], state_bytes: int) -> Row:
    stall_s, durable_s, cpu_s, cold_s, cached_s = (median(column) for column in zip(*times, strict=True))
    return {
        "what": "method",
        "method": method,
        "stall_s": stall_s,
        "durable_s": durable_s,
        "durable_bytes_per_s": state_bytes / durable_s,
        "cpu_s": cpu_s,
        "load_s": cold_s,
        "load_cached_s": cached_s,
    }


_others: list[Others] = []
"""The one object of this process, if it is the process of the others."""


def _start(root: Path, device: torch.device) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    _others.append(Others(root, device))


def _turn(method: str, path: Path) -> tuple[float, ...]:
    """Return the seconds of a save, as `Others.save`, and of a load from the disk and from the page cache."""
    (others,) = _others
    times = others.save(method, path)
    drop_cached(path)
    return *times, *(seconds(lambda: others.load(method, path)) for _ in range(2))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
