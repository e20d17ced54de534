"""Saves a run while it trains: a snapshot into host memory, a writer process beside each rank, a commit.

    begin    every rank copies what it owns into memory that it shares with its writer: the only stop
    writing  the writers put their files and read them again
    commit   when all have, rank 0's writer puts the manifest, and retention passes

The ranks never wait for one another's storage: whether all writers are done is part of the vote that
they hold at every step anyway. One save is in flight; a failed one leaves nothing that a reader takes, is
reported, and the run goes on to the next.
"""

import json
import mmap
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dit_scale.checkpoint.manifest import Manifest
from dit_scale.checkpoint.partition import Partition
from dit_scale.checkpoint.writer import Commit, Reply, Source, Write
from dit_scale.config import CheckpointConfig
from dit_scale.dist import World
from dit_scale.errors import SupersededError
from dit_scale.signals import deaf_children

WRITER = (sys.executable, "-m", "dit_scale.checkpoint.writer")
_POLL_S = 0.005


@dataclass(frozen=True)
class SaveResult:
    """How a save ended: equal on all ranks."""

    manifest: Manifest
    problem: str
    """Empty when it is committed."""
    dropped: tuple[str, ...]
    """Checkpoints that retention deleted."""
    retention_problem: str
    is_final: bool
    """Whether another try under the same name would fail as well."""
    seconds: float
    """From the snapshot to the commit, retention included."""


class Snapshot:
    """Host memory, shared with the writer, that holds a copy of all that a rank owns."""

    def __init__(self, owned: Iterable[Partition]) -> None:
        self._owned = tuple(owned)
        self.bytes = sum(4 * b.numel() for part in self._owned for b in part.buffers.values())
        self.file = os.memfd_create(
            "snapshot"
        )  # belongs to the processes that hold it: nothing is left behind
        os.ftruncate(self.file, max(self.bytes, 1))
        memory = torch.frombuffer(mmap.mmap(self.file, max(self.bytes, 1)), dtype=torch.uint8)
        memory.zero_()  # makes the pages, so that the first copy takes no longer than later ones
        self._pin(memory)
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.sources: list[Source] = []
        offset = 0
        for partition in self._owned:
            for kind, buffer in partition.buffers.items():
                size = 4 * buffer.numel()
                self._copies.append((memory[offset : offset + size].view(torch.float32), buffer.detach()))
                self.sources += [
                    Source(
                        kind=kind,
                        parameter=extent.parameter,
                        start=extent.start,
                        length=extent.length,
                        memory_offset=offset + 4 * extent.offset,
                    )
                    for extent in partition.extents
                ]
                offset += size

    @torch.no_grad()
    def take(self) -> None:
        """Copy; returns when the copy is whole."""
        for host, buffer in self._copies:
            host.copy_(buffer.flatten(), non_blocking=True)
        if any(buffer.is_cuda for _, buffer in self._copies):
            torch.cuda.synchronize()

    def _pin(self, memory: torch.Tensor) -> None:
        """Lock the memory for copies at the full speed of the bus."""
        if any(b.is_cuda for part in self._owned for b in part.buffers.values()):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))


class Saver:
    """One rank's side of all saves. Every method but `close` is called by all ranks at the same step."""

    def __init__(
        self,
        world: World,
        root: str,
        owned: Iterable[Partition],
        config: CheckpointConfig,
        record: Iterable[Path] = (),
    ) -> None:
        """`record` are files of this machine that each checkpoint takes along, as they are at its commit."""
        self._world, self._root, self._config = world, root, config
        self._record = tuple(map(str, record))
        self.snapshot = Snapshot(owned)
        self._writer: subprocess.Popen[bytes] | None = None
        self._phase: Literal["idle", "writing", "committing"] = "idle"
        self._awaiting = False
        """Whether this rank's writer owes an answer."""
        self._reply = Reply()
        self._since_s = 0.0
        self._folders: dict[str, tuple[str, ...]] = {}
        self._manifest: Manifest | None = None
        self._start()

    @property
    def in_flight(self) -> bool:
        return self._phase != "idle"

    def begin(self, manifest: Manifest, folders: dict[str, tuple[str, ...]]) -> None:
        """Take a snapshot and have it written below these folders, with the kinds that belong in each."""
        assert not self.in_flight
        self._manifest, self._folders, self._since_s = manifest, folders, time.monotonic()
        self.snapshot.take()
        self._phase = "writing"
        self._ask("write", Write(checkpoint=manifest.id, folders=folders))

    def flags(self) -> tuple[bool, bool]:
        """(this rank's writer is at work, its work has failed): what the rank says in the vote."""
        if self._awaiting:
            self._look()
        return self._awaiting, bool(self._reply.problem)

    def advance(self, any_at_work: bool, any_failed: bool) -> SaveResult | None:
        """Take the next step, given the vote of all ranks. Returns how the save ended, once it has.

        Raises SupersededError, on all ranks, when a later attempt of the run has begun.
        """
        if not self.in_flight or any_at_work:
            return None
        replies = self._world.gather(self._reply)
        if any_failed or self._phase == "committing":
            return self._end(replies)
        self._phase = "committing"
        if self._world.is_first:
            assert self._manifest is not None
            config = self._config
            request = Commit(
                files={folder: tuple(reply.files[folder] for reply in replies) for folder in self._folders},
                manifest=self._manifest,
                record=self._record,
                keep=config.keep,
                keep_every_steps=config.keep_every_steps,
            )
            self._ask("commit", request)
        return None

    def wait(self, voted: Callable[[], None] = lambda: None) -> SaveResult | None:
        """Stay until the save in flight has ended; None when there is none. `voted` hears that all live."""
        while self.in_flight:
            voted()
            outcome = self.advance(*self._world.begin_any(*self.flags()).result())
            if outcome is not None:
                return outcome
            time.sleep(_POLL_S)
        return None

    def close(self) -> None:
        """End the writer; a save in flight is given up."""
        if self._writer is not None:
            self._writer.kill()
            self._forget_writer()
        os.close(self.snapshot.file)

    def _end(self, replies: list[Reply]) -> SaveResult:
        assert self._manifest is not None
        bad = [(rank, reply) for rank, reply in enumerate(replies) if reply.problem]
        manifest, self._manifest = self._manifest, None
        self._phase, self._reply = "idle", Reply()
        for _, reply in bad:
            if reply.superseded:
                raise SupersededError(reply.problem)
        problem = "; ".join(f"rank {rank}: {reply.problem}" for rank, reply in bad)
        first = replies[0]
        took_s = time.monotonic() - self._since_s
        is_final = any(reply.taken for reply in replies)
        return SaveResult(manifest, problem, first.dropped, first.retention_problem, is_final, took_s)

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
        self._send(json.dumps([source.model_dump() for source in self.snapshot.sources]))

    def _ask(self, what: str, request: Write | Commit) -> None:
        self._reply, self._awaiting = Reply(), True
        if self._writer is None:
            self._start()
        self._send(f'{{"do":"{what}",{request.model_dump_json()[1:]}')

    def _send(self, line: str) -> None:
        if self._writer is None:  # it has just died, and the reply says so
            return
        assert self._writer.stdin is not None
        try:
            self._writer.stdin.write(line.encode() + b"\n")
            self._writer.stdin.flush()
        except BrokenPipeError:
            self._reply = Reply(problem=self._writer_died())

    def _look(self) -> None:
        """Take the answer if there is one."""
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
        return f"its writer process ended with {code}; the next save starts another"

    def _forget_writer(self) -> None:
        assert self._writer is not None
        self._writer.wait()
        for pipe in (self._writer.stdin, self._writer.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # a request that it did not live to read
                    pipe.close()
        self._writer = None
