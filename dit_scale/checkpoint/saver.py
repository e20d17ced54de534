"""Asynchronous saves: a snapshot in host memory, a writer process next to each rank, then a commit.

    begin       every rank copies what it owns into memory shared with its writer; only this pauses training
    writing     the writers write their files and read them back
    committing  when all writers are done, rank 0's writer writes the manifest and prunes

Ranks never wait for each other's storage: whether all writers are done is part of the vote that the ranks
hold at every step anyway. At most one save is in flight. A failed save leaves nothing that a reader accepts;
it is reported, and training continues.
"""

import mmap
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from dit_scale.checkpoint.manifest import Manifest
from dit_scale.checkpoint.partition import Partition
from dit_scale.checkpoint.retention import Rule
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.checkpoint.writer import SLICES, Commit, Reply, Write
from dit_scale.config import CheckpointConfig
from dit_scale.dist import World
from dit_scale.errors import SupersededError
from dit_scale.signals import deaf_children

WRITER = (sys.executable, "-m", "dit_scale.checkpoint.writer")
_POLL_S = 0.005


@dataclass(frozen=True)
class SaveResult:
    """The result of a save: the same on all ranks."""

    manifest: Manifest
    problem: str
    """Why the save failed; empty when it is committed."""
    dropped: tuple[str, ...]
    """Checkpoints that retention deleted."""
    retention_problem: str
    is_final: bool
    """Whether a retry under the same name would fail as well."""
    seconds: float
    """Time from the snapshot to the end of the commit, including retention."""


class Snapshot:
    """A copy of everything that a rank owns, in host memory shared with its writer."""

    def __init__(self, owned: Iterable[Partition]) -> None:
        self._owned = tuple(owned)
        self.bytes = sum(4 * b.numel() for part in self._owned for b in part.buffers.values())
        # The kernel frees an anonymous file when the last process that holds it exits.
        self.file = os.memfd_create("snapshot")
        os.ftruncate(self.file, max(self.bytes, 1))
        memory = torch.frombuffer(mmap.mmap(self.file, max(self.bytes, 1)), dtype=torch.uint8)
        memory.zero_()  # allocates the pages now, not during the first snapshot
        self._pin(memory)
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.slices: list[tuple[str, ParameterSlice]] = []
        """The layout of the memory: (kind, slice)."""
        first = 0
        for partition in self._owned:
            for kind, buffer in partition.buffers.items():
                end = first + buffer.numel()
                self._copies.append((memory[4 * first : 4 * end].view(torch.float32), buffer.detach()))
                self.slices += [
                    (kind, replace(slice_, offset=first + slice_.offset)) for slice_ in partition.slices
                ]
                first = end

    @torch.no_grad()
    def take(self) -> None:
        """Copy everything; returns when the copy is complete."""
        for host, buffer in self._copies:
            host.copy_(buffer.flatten(), non_blocking=True)
        if any(buffer.is_cuda for _, buffer in self._copies):
            torch.cuda.synchronize()

    def _pin(self, memory: torch.Tensor) -> None:
        """Page-lock the memory, so that copies from the GPU run at the full speed of the bus."""
        if any(b.is_cuda for part in self._owned for b in part.buffers.values()):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))


class Saver:
    """One rank's side of all saves. All ranks call every method except `close` at the same step."""

    def __init__(
        self,
        world: World,
        root: str,
        owned: Iterable[Partition],
        config: CheckpointConfig,
        record: Iterable[Path] = (),
    ) -> None:
        """`record` names local files that each checkpoint carries along, as they are at its commit."""
        self._world, self._root, self._config = world, root, config
        self._record = tuple(map(str, record))
        self.snapshot = Snapshot(owned)
        self._writer: subprocess.Popen[bytes] | None = None
        self._phase: Literal["idle", "writing", "committing"] = "idle"
        self._awaiting = False
        """Whether this rank's writer owes a reply."""
        self._reply = Reply()
        self._since_s = 0.0
        self._folders: dict[str, tuple[str, ...]] = {}
        self._manifest: Manifest | None = None
        self._start()

    @property
    def in_flight(self) -> bool:
        """Whether a save has started and has no result yet."""
        return self._phase != "idle"

    def begin(self, manifest: Manifest, folders: dict[str, tuple[str, ...]]) -> None:
        """Take a snapshot and start to write it. `folders` maps CHECKPOINTS or EMA to the kinds in there."""
        assert not self.in_flight
        self._manifest, self._folders, self._since_s = manifest, folders, time.monotonic()
        self.snapshot.take()
        self._phase = "writing"
        self._ask("write", Write(checkpoint=manifest.id, folders=folders))

    def flags(self) -> tuple[bool, bool]:
        """Return this rank's part of the vote: (its writer is busy, its writer failed)."""
        if self._awaiting:
            self._poll()
        return self._awaiting, bool(self._reply.problem)

    def advance(self, any_busy: bool, any_failed: bool) -> SaveResult | None:
        """Move the save forward, given the vote of all ranks. Returns its result once it has one.

        Raises SupersededError, on all ranks, when a later attempt of the run has started.
        """
        if not self.in_flight or any_busy:
            return None
        replies = self._world.gather(self._reply)
        if any_failed or self._phase == "committing":
            return self._finish(replies)
        self._phase = "committing"
        if self._world.is_first:
            assert self._manifest is not None
            config = self._config
            request = Commit(
                files={folder: tuple(reply.files[folder] for reply in replies) for folder in self._folders},
                manifest=self._manifest,
                record=self._record,
                rule=Rule(config.keep, config.keep_every_steps, config.keep_best),
            )
            self._ask("commit", request)
        return None

    def wait(self, voted: Callable[[], None] = lambda: None) -> SaveResult | None:
        """Wait for the save in flight; None if there is none. Calls `voted` before every vote."""
        while self.in_flight:
            voted()
            result = self.advance(*self._world.start_vote(*self.flags()).result())
            if result is not None:
                return result
            time.sleep(_POLL_S)
        return None

    def close(self) -> None:
        """Kill the writer; a save in flight is abandoned."""
        if self._writer is not None:
            self._writer.kill()
            self._forget_writer()
        os.close(self.snapshot.file)

    def _finish(self, replies: list[Reply]) -> SaveResult:
        assert self._manifest is not None
        bad = [(rank, reply) for rank, reply in enumerate(replies) if reply.problem]
        manifest, self._manifest = self._manifest, None
        self._phase, self._reply = "idle", Reply()
        for _, reply in bad:
            if reply.superseded:
                raise SupersededError(reply.problem)
        problem = "; ".join(f"rank {rank}: {reply.problem}" for rank, reply in bad)
        return SaveResult(
            manifest=manifest,
            problem=problem,
            dropped=replies[0].dropped,
            retention_problem=replies[0].retention_problem,
            is_final=any(reply.taken for reply in replies),
            seconds=time.monotonic() - self._since_s,
        )

    def _start(self) -> None:
        options = {
            "rank": self._world.rank,
            "memory": self.snapshot.file,
            "memory-bytes": max(self.snapshot.bytes, 1),
            "parent": os.getpid(),
            "root": self._root,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        with deaf_children():
            self._writer = subprocess.Popen(
                [*WRITER, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[self.snapshot.file],
            )
        self._send(SLICES.dump_json(self.snapshot.slices).decode())

    def _ask(self, what: str, request: Write | Commit) -> None:
        self._reply, self._awaiting = Reply(), True
        if self._writer is None:
            self._start()
        self._send(f'{{"do":"{what}",{request.model_dump_json()[1:]}')

    def _send(self, line: str) -> None:
        if self._writer is None:  # died just now; the reply says so
            return
        assert self._writer.stdin is not None
        try:
            self._writer.stdin.write(line.encode() + b"\n")
            self._writer.stdin.flush()
        except BrokenPipeError:
            self._reply = Reply(problem=self._writer_died())

    def _poll(self) -> None:
        """Take the writer's reply if there is one, or give up at the deadline."""
        if self._writer is None:
            self._awaiting = False
            return
        assert self._writer.stdout is not None
        if select.select([self._writer.stdout], [], [], 0)[0]:
            line = self._writer.stdout.readline()
            self._reply = Reply.model_validate_json(line) if line else Reply(problem=self._writer_died())
            self._awaiting = False
        elif time.monotonic() - self._since_s > self._config.deadline_s:
            self._writer.kill()
            self._forget_writer()
            self._reply = Reply(
                problem=f"not written within checkpoint.deadline_s={self._config.deadline_s:g}"
            )
            self._awaiting = False

    def _writer_died(self) -> str:
        assert self._writer is not None
        code = self._writer.wait()
        self._forget_writer()
        return f"its writer process exited with {code}; the next save starts a new one"

    def _forget_writer(self) -> None:
        assert self._writer is not None
        self._writer.wait()
        for pipe in (self._writer.stdin, self._writer.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # a request that it never read
                    pipe.close()
        self._writer = None
