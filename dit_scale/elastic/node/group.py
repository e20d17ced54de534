"""The ranks of one node in one round: started by the deepspeed launcher, watched from outside, all ended.

The launcher is not believed: killed, it leaves its ranks alive. So ranks are found by a mark in their
environment, signalled directly, and believed by their verdicts. The launcher is the program that `deepspeed`
itself starts on each node: what stands before it would import torch once more before a rank may begin to.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from dit_scale.elastic.board import Reason, Round
from dit_scale.elastic.node.deadlines import Deadlines, Standing, culprit, standings
from dit_scale.elastic.node.exits import Exit, Verdict, read_verdict
from dit_scale.elastic.node.stacks import STACK_SIGNAL, ask_for_stacks, is_in_collective
from dit_scale.heartbeat import FOLDER_VARIABLE, Beat, Phase, beat_path, place, read_beat
from dit_scale.journal import Event
from dit_scale.signals import ALWAYS, UNLESS_IGNORED

MARK = "DIT_SCALE_GROUP"
"""Variable in the environment of every process of a group."""
SUPERVISOR_VARIABLE = "DIT_SCALE_SUPERVISOR"
"""Environment variable with the process id of the supervisor, without whom ranks do not go on."""
BLIND_S = 5.0
"""After a longer time between two looks this process was stopped itself, and the ranks maybe with it."""
END_S = 20.0
"""Time in which killed processes must be gone; a process in the kernel may take longer."""


@dataclass(frozen=True)
class GroupOutcome:
    """How the ranks of this node ended, or that they do not get on."""

    reason: Reason
    text: str
    details: dict[str, Any] = field(default_factory=dict)
    first_hand: bool = True
    """False when it may follow from what happened to a rank of another node."""
    node: str = ""
    """Where; empty: on this one."""


class Group(Protocol):
    """The ranks of one node."""

    def start(self, round_: Round, index: int) -> None:
        """Start them as those of member `index`."""

    def poll(self) -> GroupOutcome | None:
        """How they ended; None while they get on."""

    def quiet(self) -> tuple[Standing, ...]:
        """Where they stand, when one of them has given no sign for longer than a step takes."""
        return ()

    def ask_to_stop(self) -> None:
        """Have them save and leave; asked again as long as they are there."""

    def keep_stacks(self) -> None:
        """Write down what they are doing, before they are ended."""

    def stop(self) -> None:
        """End them now; when this returns nothing of them is left."""


class LaunchedGroup:
    """Ranks under DeepSpeed's launcher."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        deadlines: Deadlines,
        record: Callable[..., None] = lambda event, **details: None,
        stacks: Path | None = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`command` is what each rank runs, as arguments of the launcher: --module NAME ARGUMENTS.

        Beats and verdicts are in `folder`, on this node; stacks of ranks that stand still are kept in
        `stacks`.
        """
        self._command, self._folder, self._deadlines = command, folder, deadlines
        self._record, self._stacks, self._say = record, stacks, say
        self._mark = ""
        self._launcher: subprocess.Popen[bytes] | None = None
        self._ranks = range(0)
        self._round = 0
        self._looked_s = self._awake_s = 0.0
        self._passed: list[Event] = []
        self._first_step = 0
        self._stalled: set[tuple[int, int]] = set()
        self._beats: dict[int, Beat] = {}
        self._stacks_then: dict[int, str] = {}
        self._asked_at: list[tuple[int, Phase, int]] = []
        self.beats = folder

    def start(self, round_: Round, index: int) -> None:
        first = sum(member.slots for member in round_.members[:index])
        self._ranks = range(first, first + round_.members[index].slots)
        self._round, self._passed, self._beats = round_.number, [], {}
        self._stacks_then, self._asked_at = {}, []
        self._stalled.clear()  # a rank may wait in the same step again
        self._looked_s = self._awake_s = time.monotonic()
        self.beats = self._folder / f"round-{round_.number:06d}"
        shutil.rmtree(self.beats, ignore_errors=True)
        self.beats.mkdir(parents=True)
        self._mark = uuid.uuid4().hex
        head = round_.members[0]
        devices = {member.node: list(range(member.slots)) for member in round_.members}
        world = base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()
        command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
        command += [f"--node_rank={index}", f"--master_addr={head.address}", f"--master_port={head.port}"]
        command += ["--log_level=warning", "--no_local_rank"]
        self._launcher = subprocess.Popen(
            [*command, *self._command],
            env=os.environ | self._variables(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_shield,
        )

    def poll(self) -> GroupOutcome | None:
        if self._launcher is None:
            return GroupOutcome(Reason.LEAVING, "ended before their first step")
        launcher_gone = self._launcher.poll() is not None
        # A rank writes its verdict before it ends: who is found dead and has none was killed.
        dead = [rank for rank, beat in self.ranks().items() if not is_alive(beat.pid)]
        beats, verdicts = self.ranks(), self._verdicts()
        self._note_progress(beats)
        if outcome := _judge(verdicts, {rank: beats[rank] for rank in dead if verdicts[rank] is None}):
            return outcome
        if launcher_gone:
            code = self._launcher.returncode
            return GroupOutcome(
                Reason.FAILED, f"the launcher ended with code {code}, but not all of its ranks"
            )
        found = self._standings()
        self._note_stalled(found)
        if not any(one.is_overdue for one in found):
            return None
        worst = culprit(found)
        details = {"rank": worst.rank, "step": worst.step, "section": worst.section.name}
        return GroupOutcome(Reason.HUNG, str(worst), details, first_hand=False)

    def quiet(self) -> tuple[Standing, ...]:
        found = self._standings()
        return tuple(found) if any(one.age_s > one.quiet_s for one in found) else ()

    def ranks(self) -> dict[int, Beat]:
        """What the ranks of this node said last; one that writes at the moment, before that."""
        for rank in self._ranks:
            if (beat := read_beat(beat_path(self.beats, rank))) is not None:
                self._beats[rank] = beat
        return dict(self._beats)

    def ask_to_stop(self) -> None:
        beats = self.ranks()
        if len(beats) < len(self._ranks) or any(beat.section == Phase.START for beat in beats.values()):
            self.stop()  # no rank of any node has taken a step: there is nothing to save
            return
        for rank, beat in beats.items():
            if self._verdicts()[rank] is None and is_alive(beat.pid):
                _signal(beat.pid, signal.SIGUSR1)

    def keep_stacks(self) -> None:
        beats = self.ranks()

        def wake_and_ask(rank: int) -> None:
            _signal(beats[rank].pid, STACK_SIGNAL)
            _signal(beats[rank].pid, signal.SIGCONT)  # a stopped one writes first of all when it goes on

        now = ask_for_stacks(self.beats, beats, wake_and_ask)
        # A rank breaks off as soon as another node ends its own: its earlier stacks tell where it stood.
        self._write_down(now | self._stacks_then)

    def stop(self) -> None:
        end_s = time.monotonic() + END_S
        while self._mark and (left := marked(self._mark)) and time.monotonic() < end_s:
            for pid in left:
                _signal(pid, signal.SIGKILL)
            time.sleep(0.02)
        if self._launcher is not None:
            self._launcher.wait()
            self._launcher = None

    def _verdicts(self) -> dict[int, Verdict | None]:
        return {rank: read_verdict(self.beats, rank) for rank in self._ranks}

    def _standings(self) -> list[Standing]:
        now_s = time.monotonic()
        if now_s - self._looked_s > BLIND_S:
            self._awake_s = now_s
        self._looked_s = now_s
        said = self.ranks()
        beats = {rank: said.get(rank) for rank in self._ranks}
        found = standings(beats, self._verdicts(), self._deadlines, now_s, self._awake_s)
        waiting = self._waiting([one for one in found if one.section >= Phase.DATA])
        return [replace(one, waits=one.rank in waiting) for one in found]

    def _waiting(self, training: Sequence[Standing]) -> set[int]:
        """Ranks inside a collective, by their stacks, which are asked for when one is overdue.

        Of ranks in the same section of the same step they are those that wait for the others. They are asked
        again when one has moved on; of ranks that have ended since, the last answer stays.
        """
        if training and not any(one.is_overdue for one in training):
            self._stacks_then, self._asked_at = {}, []
            return set()
        places = [(one.rank, one.section, one.step) for one in training]
        if places != self._asked_at:
            self._stacks_then |= self._ask(training)
            self._asked_at = places
        return {rank for rank, text in self._stacks_then.items() if is_in_collective(text)}

    def _note_stalled(self, found: Sequence[Standing]) -> None:
        """Name a rank that waits for data longer than a step takes, once for each wait.

        The data may still come; that the rank gives up has time until its deadline.
        """
        stalled = [
            one
            for one in found
            if one.section == Phase.DATA
            and one.age_s > one.quiet_s
            and (one.rank, one.step) not in self._stalled
        ]
        if not stalled:
            return
        self._write_down(self._stacks_then or self._ask(found))
        for one in stalled:
            self._stalled.add((one.rank, one.step))
            self._record(Event.STALLED, round=self._round, rank=one.rank, step=one.step, text=str(one))
            self._say(f"{one}; it is given {one.limit_s:g} s. Stacks are in {self._stacks}")

    def _ask(self, found: Sequence[Standing]) -> dict[int, str]:
        """The stacks of those that are not stopped."""
        pids = {one.rank: one.pid for one in found if one.pid and not one.stopped}
        return ask_for_stacks(self.beats, pids, lambda rank: _signal(pids[rank], STACK_SIGNAL))

    def _write_down(self, stacks: Mapping[int, str]) -> None:
        if self._stacks is None:
            return
        try:
            self._stacks.mkdir(parents=True, exist_ok=True)
            for rank, text in stacks.items():
                (self._stacks / f"round-{self._round:06d}-rank-{rank:05d}.stack").write_text(text)
        except OSError as error:
            self._say(f"ALARM: the stacks of ranks cannot be kept in {self._stacks}: {error.strerror}")

    def _note_progress(self, beats: Mapping[int, Beat]) -> None:
        """Write into the journal how far the start is: what a restart costs is in the times between."""
        if len(beats) < len(self._ranks) or Event.FIRST_STEP in self._passed:
            return
        least = min(beat.section if beat.step == 0 else Phase.DATA for beat in beats.values())
        step = min(beat.step for beat in beats.values())
        reached = [Event.FIRST_BEAT]
        if least >= Phase.RESTORE:
            reached.append(Event.ENGINE_READY)
        if least >= Phase.DATA:
            reached.append(Event.RESTORED)
            if Event.RESTORED in self._passed and step > self._first_step:
                reached.append(Event.FIRST_STEP)
        for event in reached:
            if event not in self._passed:
                self._passed.append(event)
                self._record(event, round=self._round, step=step)
                self._first_step = step

    def _variables(self) -> Mapping[str, str]:
        return {
            MARK: self._mark,
            FOLDER_VARIABLE: str(self.beats),
            SUPERVISOR_VARIABLE: str(os.getpid()),
            # For the launcher, which computes nothing: it would look for devices, twice, and warn where there
            # are none. Ranks choose by themselves.
            "DS_ACCELERATOR": "cpu",
        }


def _judge(verdicts: Mapping[int, Verdict | None], killed: Mapping[int, Beat]) -> GroupOutcome | None:
    """What verdicts and deaths tell: the end of all ranks, or why one broke off."""
    said = [verdict for verdict in verdicts.values() if verdict is not None]
    if wrong := [verdict for verdict in said if verdict.code == Exit.DO_NOT_RESTART]:
        return _failed(Reason.MISTAKE, wrong[:1])
    if killed:
        texts = [
            f"rank {rank} (process {beat.pid}) was killed {place(beat.section, beat.step)}"
            for rank, beat in killed.items()
        ]
        rank, beat = next(iter(killed.items()))
        details = {"rank": rank, "step": beat.step, "section": beat.section.name}
        return GroupOutcome(Reason.FAILED, "; ".join(texts), details)
    broken = [verdict for verdict in said if verdict.code not in (Exit.DONE, Exit.REQUEUE)]
    if broken:
        return _failed(Reason.FAILED, [one for one in broken if not one.second_hand] or broken[:1])
    if len(said) < len(verdicts):
        return None
    if all(verdict.code == Exit.DONE for verdict in said):
        return GroupOutcome(Reason.DONE, f"{said[0].step} steps are taken and saved")
    return GroupOutcome(Reason.LEAVING, f"saved at step {said[0].step} and stopped")


def _failed(reason: Reason, verdicts: Sequence[Verdict]) -> GroupOutcome:
    texts = [f"rank {verdict.rank}: {verdict.error}: {verdict.message}" for verdict in verdicts]
    first = verdicts[0]
    details = {"rank": first.rank, "step": first.step, "section": first.section}
    return GroupOutcome(reason, "; ".join(texts), details, first_hand=not first.second_hand)


def _shield() -> None:
    """In the launcher before it starts: a scheduler's signals to all processes are for the ranks alone.

    It would die of them, or end its ranks. What is blocked stays so over exec and in children until ranks
    take it again; what is ignored stays so in ranks, too: the supervisor gets it, and asks them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ALWAYS)
    for number in UNLESS_IGNORED:
        signal.signal(number, signal.SIG_IGN)


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


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it was quicker
