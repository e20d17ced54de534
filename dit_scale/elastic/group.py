"""The ranks of one node in one round: started by the deepspeed launcher, watched from outside, all ended.

The launcher is not believed: killed, it leaves with 0 and its ranks live on; told to end, it ends its front
alone. So ranks are found by a mark in their environment, signalled directly, and believed by their verdicts.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dit_scale.elastic.board import Reason, Round
from dit_scale.elastic.exits import Exit, Verdict, read_verdict
from dit_scale.elastic.heartbeat import FOLDER_VARIABLE, Beat, beat_path, read_beat
from dit_scale.elastic.watch import Deadlines, Stall, find_stall

MARK = "DIT_SCALE_GROUP"
"""Variable in the environment of every process of a group."""
SUPERVISOR_VARIABLE = "DIT_SCALE_SUPERVISOR"
"""Environment variable with the process id of the supervisor, without whom ranks do not go on."""
END_S = 20.0
"""Time in which killed processes must be gone; a process in the kernel may take longer."""


@dataclass(frozen=True)
class Outcome:
    """How the ranks of this node ended, or that they do not get on."""

    reason: Reason
    text: str
    details: dict[str, Any] = field(default_factory=dict)


class Group(Protocol):
    """The ranks of one node."""

    def start(self, round_: Round, index: int) -> None:
        """Start them as those of member `index`."""

    def poll(self) -> Outcome | None:
        """How they ended; None while they get on."""

    def ask_to_stop(self) -> None:
        """Have them save and leave."""

    def stop(self) -> None:
        """End them now; when this returns nothing of them is left."""


class LaunchedGroup:
    """Ranks under the `deepspeed` launcher."""

    def __init__(self, command: Sequence[str], folder: Path, deadlines: Deadlines) -> None:
        """`command` is what each rank runs, as arguments of the launcher: --module NAME ARGUMENTS."""
        self._command, self._folder, self._deadlines = command, folder, deadlines
        self._mark = ""
        self._launcher: subprocess.Popen[bytes] | None = None
        self._ranks = range(0)
        self.beats = folder

    def start(self, round_: Round, index: int) -> None:
        first = sum(member.slots for member in round_.members[:index])
        self._ranks = range(first, first + round_.members[index].slots)
        self.beats = self._folder / f"round-{round_.number:06d}"
        shutil.rmtree(self.beats, ignore_errors=True)
        self.beats.mkdir(parents=True)
        hostfile = self.beats / "hostfile"
        hostfile.write_text("".join(f"{member.node} slots={member.slots}\n" for member in round_.members))
        self._mark = uuid.uuid4().hex
        head = round_.members[0]
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [str(launcher), "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(index)]
        command += ["--master_addr", head.address, "--master_port", str(head.port), "--no_local_rank"]
        self._launcher = subprocess.Popen(
            [*command, *self._command],
            env=os.environ | self._variables(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_shield,
        )

    def poll(self) -> Outcome | None:
        assert self._launcher is not None
        launcher_gone = self._launcher.poll() is not None
        beats = {rank: read_beat(beat_path(self.beats, rank)) for rank in self._ranks}
        verdicts = {rank: read_verdict(self.beats, rank) for rank in self._ranks}
        left = _judge(verdicts)
        if left is not None:
            return left
        killed = [
            f"rank {rank} (process {beat.pid}) was killed in {beat.section.name} of step {beat.step}"
            for rank, beat in beats.items()
            if beat is not None and verdicts[rank] is None and not is_alive(beat.pid)
        ]
        if killed:
            return Outcome(Reason.FAILED, "; ".join(killed))
        if launcher_gone:
            # A rank writes its verdict before it ends, so those without one are alive or were killed.
            return Outcome(Reason.FAILED, f"the launcher ended with code {self._launcher.returncode}")
        stall = find_stall(beats, verdicts, self._deadlines, time.monotonic())
        return _stalled(stall) if stall else None

    def ranks(self) -> dict[int, Beat]:
        """What the ranks of this node said last."""
        found = {rank: read_beat(beat_path(self.beats, rank)) for rank in self._ranks}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def ask_to_stop(self) -> None:
        for beat in self.ranks().values():
            if is_alive(beat.pid):
                os.kill(beat.pid, signal.SIGUSR1)

    def stop(self) -> None:
        end_s = time.monotonic() + END_S
        while self._mark and (left := marked(self._mark)) and time.monotonic() < end_s:
            for pid in left:
                _kill(pid)
            time.sleep(0.02)
        if self._launcher is not None:
            self._launcher.wait()
            self._launcher = None

    def _variables(self) -> Mapping[str, str]:
        return {
            MARK: self._mark,
            FOLDER_VARIABLE: str(self.beats),
            SUPERVISOR_VARIABLE: str(os.getpid()),
        }


def _judge(verdicts: Mapping[int, Verdict | None]) -> Outcome | None:
    """What the verdicts alone tell: the end of all ranks, or the error of one."""
    said = [verdict for verdict in verdicts.values() if verdict is not None]
    for code, reason in ((Exit.DO_NOT_RESTART, Reason.MISTAKE), (Exit.MISTAKE, Reason.MISTAKE)):
        if wrong := [verdict for verdict in said if verdict.code == code]:
            return Outcome(reason, f"rank {wrong[0].rank}: {wrong[0].message}")
    if wrong := [verdict for verdict in said if verdict.code not in (Exit.DONE, Exit.REQUEUE)]:
        texts = [f"rank {verdict.rank}: {verdict.error}: {verdict.message}" for verdict in wrong]
        return Outcome(Reason.FAILED, "; ".join(texts), {"step": wrong[0].step})
    if len(said) < len(verdicts):
        return None
    if all(verdict.code == Exit.DONE for verdict in said):
        return Outcome(Reason.DONE, f"step {said[0].step} is the last one")
    return Outcome(Reason.LEAVING, f"saved at step {said[0].step} and stopped")


def _stalled(stall: Stall) -> Outcome:
    return Outcome(Reason.HUNG, str(stall), {"rank": stall.rank, "step": stall.step})


def _shield() -> None:
    """In the launcher before it starts: a scheduler's SIGTERM to all processes is for the ranks alone.

    A blocked signal stays blocked over exec and in children; ranks take it again.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def marked(mark: str) -> list[int]:
    """Processes of a group that are no zombies."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if needle in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # gone since, or of another user
            continue
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it was quicker
