"""Requests and replies of the writer: it reports failures to the rank, which decides how to react."""

import io
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from dit_scale.checkpoint import writer
from dit_scale.checkpoint.manifest import CHECKPOINTS, CheckpointId
from dit_scale.checkpoint.partition import MASTER
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.errors import CheckpointError, StorageError, SupersededError
from dit_scale.storage import DiskStorage

CHECKPOINT = CheckpointId(3, 1)
REQUEST = {"do": "write", "checkpoint": asdict(CHECKPOINT), "folders": {CHECKPOINTS: [MASTER]}}


class FailingDisk(DiskStorage):
    """A disk on which the first writes fail."""

    def __init__(self, folder: Path, errors: list[BaseException]) -> None:
        super().__init__(folder)
        self._errors = errors

    def write_stream(self, key: str, chunks: Iterable[memoryview], size: int) -> None:
        if self._errors:
            raise self._errors.pop()
        super().write_stream(key, chunks, size)


@pytest.mark.parametrize(
    ("error", "superseded"),
    [
        (StorageError("the disk is full"), False),
        (CheckpointError("a file is damaged"), False),
        (SupersededError("attempt 2 has started"), True),
        (OSError("no such device"), False),
        (MemoryError("no memory"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_is_reported_and_the_next_request_is_answered(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    superseded: bool,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(2 * (json.dumps(REQUEST) + "\n")))
    slices = [(MASTER, ParameterSlice("w", start=0, length=2, offset=0))]
    memory = np.array([1.5, -2.0], "<f4").view(np.uint8)
    writer.serve(FailingDisk(tmp_path, [error]), 0, memory, slices)
    first, second = map(writer.Reply.model_validate_json, capsys.readouterr().out.splitlines())
    assert first == writer.Reply(problem=str(error), superseded=superseded)
    assert second.problem == ""
    assert (
        second.files[CHECKPOINTS].bytes
        == (tmp_path / CHECKPOINT.path() / "rank-00000.safetensors").stat().st_size
    )


ARGUMENTS = {"rank": "0", "memory": "3", "memory-bytes": "8", "parent": "1", "root": "/tmp"}


@pytest.mark.parametrize("missing", ARGUMENTS)
def test_all_arguments_are_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    given = [f"--{name}={value}" for name, value in ARGUMENTS.items() if name != missing]
    monkeypatch.setattr(sys, "argv", ["writer", *given])
    monkeypatch.setattr(writer, "_die_with", lambda parent: sys.exit(1))
    with pytest.raises(SystemExit, match="2"):
        writer.main()
    assert f"required: --{missing}\n" in capsys.readouterr().err
