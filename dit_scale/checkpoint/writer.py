"""The process next to each rank that writes its part of a checkpoint while training continues. No torch.

`dit_scale.checkpoint.saver` starts it and shares a memory file with it that holds the snapshot. Requests
and replies are lines of JSON on stdin and stdout.

    {"do": "write", ...}    write this rank's files, read them back, reply when every block is right
    {"do": "commit", ...}   on rank 0, after all ranks have written: write the manifests, then prune

Stop signals are for the ranks, which decide whether this save is still needed: the writer starts with them
blocked. It exits with its rank: at the end of its input, or through the kernel when the rank is killed.
"""

import argparse
import ctypes
import json
import mmap
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter

from dit_scale.checkpoint import attempts, rankfile, retention
from dit_scale.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointId,
    FileRecord,
    Manifest,
    read_manifest,
)
from dit_scale.checkpoint.rankfile import Bytes
from dit_scale.checkpoint.retention import Rule
from dit_scale.checkpoint.slices import ParameterSlice, StateSlices
from dit_scale.errors import CheckpointError, DitScaleError, SupersededError, TakenError
from dit_scale.sealed import sealed
from dit_scale.storage import Storage, open_storage

_PR_SET_PDEATHSIG = 1

SLICES = TypeAdapter(list[tuple[str, ParameterSlice]])
"""The first line of the input: the layout of the snapshot in the shared memory."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True)


class Write(_Message):
    """Write a file of this rank into the checkpoint below each folder."""

    checkpoint: CheckpointId
    folders: dict[str, tuple[str, ...]]
    """Folder, CHECKPOINTS or EMA => kinds of state that belong there."""


class Commit(_Message):
    """Write the record into the checkpoint, then the manifest below each folder, then prune."""

    files: dict[str, tuple[FileRecord, ...]]
    """Folder => the file of every rank."""
    manifest: Manifest
    record: tuple[str, ...] = ()
    """Local files that the checkpoint carries along: see dit_scale.train.run_folder."""
    rule: Rule
    """What retention keeps."""


class Reply(_Message):
    """The result of a request."""

    problem: str = ""
    superseded: bool = False
    taken: bool = False
    """Whether the checkpoint's name is taken, so that a retry would fail as well."""
    files: dict[str, FileRecord] = {}
    """Folder => the file that this rank wrote."""
    dropped: tuple[str, ...] = ()
    """Checkpoints that retention deleted."""
    retention_problem: str = ""
    """Why retention stopped; the checkpoint itself is committed."""


def write(root: Storage, rank: int, memory: Bytes, slices: StateSlices, request: Write) -> Reply:
    """Write this rank's files and read them back. Raises TakenError, CheckpointError or StorageError."""
    files = {}
    for folder, kinds in request.folders.items():
        path, wanted = request.checkpoint.path(folder), [pair for pair in slices if pair[0] in kinds]
        key = f"{path}/{rankfile.file_name(rank)}"
        if root.exists(f"{path}/{MANIFEST}"):
            # A retry of our own commit finds this very file; any other file belongs to another process.
            file = rankfile.record_of(key, memory, wanted)
            if file not in _committed_files(root, request.checkpoint, folder):
                raise _taken(root, path)
        files[folder] = rankfile.write(root, key, memory, wanted)
        rankfile.verify(root, path, files[folder])
    return Reply(files=files)


def _committed_files(root: Storage, checkpoint_id: CheckpointId, folder: str) -> tuple[FileRecord, ...]:
    try:
        return read_manifest(root, checkpoint_id, folder).files
    except CheckpointError:
        return ()


def _taken(root: Storage, path: str) -> TakenError:
    return TakenError(
        f"{root.url}/{path} has a manifest already: another process writes to this run, or the checkpoint "
        "was copied there. Nothing in it was changed; a restart takes another number"
    )


def commit(root: Storage, request: Commit) -> Reply:
    """Commit the checkpoint, then delete what retention does not keep.

    Raises SupersededError when a later attempt has started, CheckpointError or StorageError otherwise.
    """
    newest = request.manifest.id
    for path in map(Path, request.record):
        # The rank that writes the record raises the alarm; a save does not depend on it.
        with suppress(OSError):
            root.write(f"{newest.path()}/{path.name}", path.read_bytes())
    for folder, files in request.files.items():
        write_manifest(root, request.manifest.model_copy(update={"files": files}), folder)
    try:
        dropped = retention.prune(root, request.manifest.attempt, newest, request.rule)
    except SupersededError:
        raise
    except DitScaleError as error:
        return Reply(retention_problem=str(error))
    return Reply(dropped=tuple(dropped))


def write_manifest(root: Storage, manifest: Manifest, folder: str = CHECKPOINTS) -> None:
    """Commit the checkpoint. Idempotent; raises TakenError if there is another manifest."""
    path = manifest.id.path(folder)
    key, data = f"{path}/{MANIFEST}", sealed(json.loads(manifest.model_dump_json()))
    attempts.check_current(root, manifest.attempt)
    if not root.write_new(key, data) and root.read(key) != data:
        raise _taken(root, path)
    # A process that was suspended since the first check has committed nothing that counts.
    attempts.check_current(root, manifest.attempt)


def serve(root: Storage, rank: int, memory: Bytes, slices: StateSlices) -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "write":
                reply = write(root, rank, memory, slices, Write.model_validate(request))
            else:
                reply = commit(root, Commit.model_validate(request))
        except (DitScaleError, OSError, MemoryError) as error:  # the rank decides how the run reacts
            reply = Reply(
                problem=str(error),
                superseded=isinstance(error, SupersededError),
                taken=isinstance(error, TakenError),
            )
        print(reply.model_dump_json(), flush=True)


def main() -> None:
    """Serve the rank that started this process until the rank exits."""
    parser = argparse.ArgumentParser(description="Started by a rank of a training run, never by hand.")
    for name in ("--rank", "--memory", "--memory-bytes", "--parent"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--root", required=True)
    args = parser.parse_args()
    _die_with(args.parent)
    slices = SLICES.validate_json(sys.stdin.readline())
    memory = np.frombuffer(mmap.mmap(args.memory, args.memory_bytes), np.uint8)
    serve(open_storage(args.root), args.rank, memory, slices)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call took effect
        sys.exit(1)


if __name__ == "__main__":
    main()
