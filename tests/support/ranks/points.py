"""Named points of a run at which a process can be held, so that a signal from outside hits it there.

    with held(Hold(folder, "between optimizer and EMA", nth=3)):
        loop.train(config)

At the n-th pass of the point the process writes its id to a file and waits for another file, forever if no
test creates it. Points in a writer are reached by `held_writer`, which a rank starts in place of its writer.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dit_scale import lines
from dit_scale.checkpoint import attempts, retention, saver, writer
from dit_scale.storage import disk
from dit_scale.telemetry import record
from dit_scale.train import attempt


@dataclass
class Hold:
    """The point, its n-th pass, and the folder of the files by which test and process communicate."""

    folder: Path
    point: str
    nth: int
    passes: int = 0

    @property
    def reached(self) -> Path:
        return self.folder / "reached"

    @property
    def go(self) -> Path:
        return self.folder / "go"

    def here(self) -> None:
        self.passes += 1
        if self.passes != self.nth:
            return
        note = self.folder / "note"
        note.write_text(str(os.getpid()))
        note.replace(self.reached)
        while not self.go.exists():
            time.sleep(0.01)


Patch = Callable[[Hold], AbstractContextManager[Any]]


def before(owner: Any, name: str) -> Patch:
    """Hold before every call of this function."""

    def patched(hold: Hold) -> AbstractContextManager[Any]:
        real = getattr(owner, name)

        def wrapper(*args: Any, **more: Any) -> Any:
            hold.here()
            return real(*args, **more)

        return patch.object(owner, name, wrapper)

    return patched


def after(owner: Any, name: str) -> Patch:
    """Hold after every call of this function."""

    def patched(hold: Hold) -> AbstractContextManager[Any]:
        real = getattr(owner, name)

        def wrapper(*args: Any, **more: Any) -> Any:
            result = real(*args, **more)
            hold.here()
            return result

        return patch.object(owner, name, wrapper)

    return patched


@contextmanager
def _inside_backward(hold: Hold) -> Iterator[None]:
    from dit_scale.train.engine import Engine

    real = Engine.backward

    def backward(self: Engine, loss: torch.Tensor, last: bool) -> None:
        if last:
            loss.register_hook(lambda gradient: hold.here())
        real(self, loss, last)

    with patch.object(Engine, "backward", backward):
        yield


@contextmanager
def _inside_reduce(hold: Hold) -> Iterator[None]:
    """Hold before the collective that sums gradients: the other ranks are inside it."""
    from deepspeed.comm.torch import TorchBackend

    from dit_scale.train.engine import Engine

    with (
        patch.object(Engine, "backward", _marked(Engine.backward)),
        patch.object(TorchBackend, "all_reduce", _held_in_backward(hold, TorchBackend.all_reduce)),
        patch.object(
            TorchBackend, "reduce_scatter_tensor", _held_in_backward(hold, TorchBackend.reduce_scatter_tensor)
        ),
    ):
        yield


_in_backward = False


def _marked(real: Callable[..., Any]) -> Callable[..., Any]:
    def backward(*args: Any, **more: Any) -> Any:
        global _in_backward
        _in_backward = True
        try:
            return real(*args, **more)
        finally:
            _in_backward = False

    return backward


def _held_in_backward(hold: Hold, real: Callable[..., Any]) -> Callable[..., Any]:
    def collective(*args: Any, **more: Any) -> Any:
        if _in_backward:
            hold.here()
        return real(*args, **more)

    return collective


@contextmanager
def _inside_log_line(hold: Hold) -> Iterator[None]:
    """Hold when half a line of the record is on the disk."""
    real = record.Record.write

    def write(self: record.Record, step: int, values: dict[str, float | None]) -> None:
        if hold.passes + 1 == hold.nth:
            os.write(self._lines._open(), b'{"step": ')
            hold.here()
            os.write(self._lines._open(), f'{step}, "half": 1}}\n'.encode())
        else:
            hold.passes += 1
            real(self, step, values)

    with patch.object(record.Record, "write", write):
        yield


@contextmanager
def _inside_snapshot(hold: Hold) -> Iterator[None]:
    """Hold when one buffer is copied and the others are not."""

    def take(self: saver.Snapshot) -> None:
        for number, (host, buffer) in enumerate(self._copies):
            host.copy_(buffer.flatten())
            if number == 0:
                hold.here()

    with patch.object(saver.Snapshot, "take", take):
        yield


RANK_POINTS: dict[str, Patch] = {
    "before forward": lambda hold: before(_trainer(), "accumulate")(hold),
    "inside backward": _inside_backward,
    "inside the reduce": _inside_reduce,
    "between optimizer and EMA": lambda hold: before(_ema(), "update")(hold),
    "after the step": lambda hold: after(_trainer(), "update")(hold),
    "inside a line of the record": _inside_log_line,
    "inside the snapshot": _inside_snapshot,
    "after the snapshot": after(saver.Snapshot, "take"),
    "before the commit": lambda hold: _asked(hold, "commit"),
    "restoring": before(attempt.Checkpoint, "read"),
    "before the claim": before(attempts, "claim"),
    "after the claim": after(attempts, "claim"),
    "before its files": before(attempt, "carried_over"),
    "after the fencing check": after(attempt, "check_current"),
    "starting its record": before(lines.LineFile, "append_lines"),
    "before its own config": before(disk.DiskStorage, "write"),
    "before its names": before(record, "publish"),
    "setting a name": lambda hold: before(record.os, "replace")(hold),
    "after its files": after(record.Record, "publish"),
}
"""Points in a rank."""

WRITER_POINTS: dict[str, Patch] = {
    "writer: before the file": before(disk.DiskStorage, "write_stream"),
    "writer: inside the file": after(disk, "_write_all"),
    "writer: before its name": before(disk.os, "replace"),
    "writer: before reading again": before(writer.rankfile, "verify"),
    "writer: before the manifest": before(writer, "write_manifest"),
    "writer: after the fencing check": after(writer.attempts, "check_current"),
    "writer: manifest without its name": before(disk.os, "link"),
    "writer: after the manifest": after(writer, "write_manifest"),
    "writer: in retention": before(retention, "delete"),
    "writer: inside retention": after(disk.DiskStorage, "delete"),
    "writer: in retention, after the fencing check": lambda hold: after(retention.attempts, "check_current")(
        hold
    ),
}
"""Points in the writer of a rank."""


def _trainer() -> Any:
    from dit_scale.train.trainer import Trainer

    return Trainer


def _ema() -> Any:
    from dit_scale.train.ema import Ema

    return Ema


@contextmanager
def _asked(hold: Hold, what: str) -> Iterator[None]:
    """Hold before a request of this kind is sent to the writer."""
    real = saver.Saver._ask

    def ask(self: saver.Saver, request: str, details: Any) -> None:
        if request == what:
            hold.here()
        real(self, request, details)

    with patch.object(saver.Saver, "_ask", ask):
        yield


@contextmanager
def held(hold: Hold) -> Iterator[None]:
    """Hold this process, or the writer that it starts, at the point."""
    if hold.point in RANK_POINTS:
        with RANK_POINTS[hold.point](hold):
            yield
        return
    command = (
        sys.executable,
        "-m",
        "tests.support.ranks.held_writer",
        str(hold.folder),
        hold.point,
        str(hold.nth),
    )
    with patch.object(saver, "WRITER", command):
        yield
