"""The process beside each rank that writes its part of a checkpoint while training goes on. No torch.

Started by `dit_scale.checkpoint.saver`, which shares a memory file with it: there lies the snapshot. Requests
and replies are lines of JSON on stdin and stdout.

    {"do": "write", ...}    put this rank's files, read them again, answer when every block was right
    {"do": "commit", ...}   on rank 0, when all have written: put the manifests, then let retention pass

Signals to stop are for ranks, who decide whether this save is still wanted: they start the writer with
them blocked. It ends with its rank: at the end of its input, or by the kernel when the rank was killed.
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
from pydantic import BaseModel, ConfigDict

from dit_scale.checkpoint import attempts, rankfile, retention
from dit_scale.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointId,
    FileRecord,
    Manifest,
    read_manifest,
)
from dit_scale.checkpoint.rankfile import Bytes, Piece
from dit_scale.errors import CheckpointError, DitScaleError, SupersededError, TakenError
from dit_scale.sealed import sealed
from dit_scale.storage import Storage, open_storage

_PR_SET_PDEATHSIG = 1


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True)


class Source(_Message):
    """A piece of the snapshot: one tensor, and where its bytes lie in the shared memory."""

    kind: str
    parameter: str
    start: int
    length: int
    memory_offset: int
    """Bytes."""


class Write(_Message):
    """Put a file of this rank into a checkpoint below each folder, with the kinds that belong there."""

    checkpoint: CheckpointId
    folders: dict[str, tuple[str, ...]]
    """Folder, CHECKPOINTS or EMA => kinds."""


class Commit(_Message):
    """Put the record beside the checkpoint, then the manifest of each folder, then let retention pass."""

    files: dict[str, tuple[FileRecord, ...]]
    """Folder => what every rank has put there."""
    manifest: Manifest
    record: tuple[str, ...] = ()
    """Files of this machine that the checkpoint takes along: see dit_scale.train.run_folder."""
    keep: int
    keep_every_steps: int


class Reply(_Message):
    """How it went."""

    problem: str = ""
    superseded: bool = False
    taken: bool = False
    """Another try would end the same way: the name is taken."""
    files: dict[str, FileRecord] = {}
    """Folder => the file that this rank has put there."""
    dropped: tuple[str, ...] = ()
    """Checkpoints that retention deleted."""
    retention_problem: str = ""
    """Why retention stopped; the checkpoint itself is committed."""


def write(root: Storage, rank: int, memory: Bytes, sources: list[Source], request: Write) -> Reply:
    """Put this rank's files and read them again. Raises TakenError, CheckpointError or StorageError."""
    files = {}
    for folder, kinds in request.folders.items():
        pieces = [
            (
                Piece(s.kind, s.parameter, s.start, s.length),
                memory[s.memory_offset : s.memory_offset + 4 * s.length],
            )
            for s in sources
            if s.kind in kinds
        ]
        path = request.checkpoint.path(folder)
        key = f"{path}/{rankfile.name_of_rank(rank)}"
        _check_free(root, request.checkpoint, folder, rankfile.record_of(key, pieces))
        files[folder] = rankfile.write(root, key, pieces)
        rankfile.verify(root, path, files[folder])
    return Reply(files=files)


def _check_free(root: Storage, checkpoint_id: CheckpointId, folder: str, file: FileRecord) -> None:
    """Raises TakenError when the checkpoint is committed with another file; with this very one it is ours."""
    path = checkpoint_id.path(folder)
    if not root.exists(f"{path}/{MANIFEST}"):
        return
    try:
        is_ours = file in read_manifest(root, checkpoint_id, folder).files
    except CheckpointError:
        is_ours = False
    if not is_ours:
        raise _taken(root, path)


def _taken(root: Storage, path: str) -> TakenError:
    return TakenError(
        f"{root.url}/{path} has a manifest already: another process writes to this run, or it was copied "
        "there; nothing in it was changed. A new start takes another number"
    )


def commit(root: Storage, request: Commit) -> Reply:
    """Make the checkpoint exist, then delete what retention does not keep.

    Raises SupersededError when a later attempt has begun, CheckpointError or StorageError otherwise.
    """
    newest = request.manifest.id
    for path in map(Path, request.record):
        with suppress(OSError):  # the rank that writes it raises the alarm; a save does not depend on it
            root.write(f"{newest.path()}/{path.name}", path.read_bytes())
    for folder, files in request.files.items():
        put_manifest(root, request.manifest.model_copy(update={"files": files}), folder)
    try:
        dropped = retention.prune(
            root, request.manifest.attempt, newest, request.keep, request.keep_every_steps
        )
    except SupersededError:
        raise
    except DitScaleError as error:
        return Reply(retention_problem=str(error))
    return Reply(dropped=tuple(dropped))


def put_manifest(root: Storage, manifest: Manifest, folder: str = CHECKPOINTS) -> None:
    """Put the manifest, once: from here on the checkpoint exists. That this very one is there is fine."""
    path = manifest.id.path(folder)
    key, data = f"{path}/{MANIFEST}", sealed(json.loads(manifest.model_dump_json()))
    attempts.check_current(root, manifest.attempt)
    if not root.write_new(key, data) and root.read(key) != data:
        raise _taken(root, path)
    attempts.check_current(root, manifest.attempt)  # one that was stopped in between does not count


def serve(root: Storage, rank: int, memory: Bytes, sources: list[Source]) -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "write":
                reply = write(root, rank, memory, sources, Write.model_validate(request))
            else:
                reply = commit(root, Commit.model_validate(request))
        except (DitScaleError, OSError, MemoryError) as error:  # the rank decides what becomes of the run
            reply = Reply(
                problem=str(error),
                superseded=isinstance(error, SupersededError),
                taken=isinstance(error, TakenError),
            )
        print(reply.model_dump_json(), flush=True)


def main() -> None:
    """Serve the rank that started this process, until it ends."""
    parser = argparse.ArgumentParser(description="Started by a rank of a training run, never by hand.")
    for name in ("--rank", "--memory", "--memory-bytes", "--parent"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--root", required=True)
    args = parser.parse_args()
    _die_with(args.parent)
    sources = [Source.model_validate(entry) for entry in json.loads(sys.stdin.readline())]
    memory = np.frombuffer(mmap.mmap(args.memory, args.memory_bytes), np.uint8)
    serve(open_storage(args.root), args.rank, memory, sources)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        sys.exit(1)


if __name__ == "__main__":
    main()
