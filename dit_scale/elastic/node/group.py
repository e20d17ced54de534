"""The ranks of one node in one round, under DeepSpeed's launcher: watched, signalled and killed from outside.

Do not trust the launcher's exit code: when killed it exits 0 and leaves its ranks running. Ranks report their
process ids by heartbeats and how they ended by verdicts, and carry a mark in their environment by which they
are found and killed.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from dit_scale.elastic.board import Reason
from dit_scale.elastic.node.deadlines import Standing, culprit
from dit_scale.elastic.node.diagnosis import Diagnosis
from dit_scale.elastic.node.outcomes import GroupOutcome, judge_exits
from dit_scale.elastic.node.processes import ProcessTable, kill_marked
from dit_scale.elastic.node.rank_files import RankFiles
from dit_scale.heartbeat import Beat, Phase
from dit_scale.journal import Event

MARK_VARIABLE = "DIT_SCALE_GROUP"
"""Environment variable of every process of a group; its value differs from group to group."""
KILL_S = 20.0
"""Longest wait for killed processes to exit. A process stuck in the kernel may take longer."""


class Group(Protocol):
    """The ranks of one node in one round."""

    def poll(self) -> GroupOutcome | None:
        """Return how they ended, or that they make no progress; None while they do."""

    def quiet(self) -> tuple[Standing, ...]:
        """Return all standings once a rank has sent no heartbeat for longer than a step takes."""
        return ()

    def ask_to_stop(self) -> None:
        """Ask the ranks to save and exit. May be called repeatedly."""

    def keep_stacks(self) -> None:
        """Write the stacks of the ranks to files before the ranks are killed."""

    def stop(self) -> None:
        """Kill the ranks now and wait until none is left."""


class LaunchedGroup:
    """Ranks that the launcher started; a new object for every round."""

    def __init__(
        self,
        *,
        launcher: "subprocess.Popen[bytes]",
        mark: str,
        files: RankFiles,
        processes: ProcessTable,
        diagnosis: Diagnosis,
        milestones: "StartMilestones",
    ) -> None:
        self._launcher, self._mark = launcher, mark
        self._files, self._processes = files, processes
        self._diagnosis, self._milestones = diagnosis, milestones
        self._is_ended = False

    def poll(self) -> GroupOutcome | None:
        if self._is_ended:
            return GroupOutcome(Reason.LEAVING, "stopped before the first step")
        exit_code = self._launcher.poll()
        # A rank writes its verdict before it exits, so read verdicts after looking for dead processes.
        heartbeats = self._files.heartbeats()
        dead = [rank for rank, beat in heartbeats.items() if not self._processes.is_alive(beat.pid)]
        heartbeats, verdicts = self._files.heartbeats(), self._files.verdicts()
        self._milestones.note(heartbeats)
        if outcome := judge_exits(verdicts, {rank: heartbeats[rank] for rank in dead if not verdicts[rank]}):
            return outcome
        if exit_code is not None:
            return GroupOutcome(
                Reason.FAILED, f"the launcher exited with code {exit_code} before all of its ranks had"
            )
        standings = self._diagnosis.standings()
        self._diagnosis.report_stalls(standings)
        if not any(one.is_overdue for one in standings):
            return None
        worst = culprit(standings)
        details = {"rank": worst.rank, "step": worst.step, "section": worst.phase.name}
        return GroupOutcome(Reason.HUNG, str(worst), details, first_hand=False)

    def quiet(self) -> tuple[Standing, ...]:
        standings = self._diagnosis.standings()
        return tuple(standings) if any(one.age_s > one.quiet_s for one in standings) else ()

    def ask_to_stop(self) -> None:
        heartbeats = self._files.heartbeats()
        if len(heartbeats) < len(self._files.ranks) or any(
            beat.phase == Phase.START for beat in heartbeats.values()
        ):
            self.stop()  # no rank of any node has taken a step, so there is nothing to save
            return
        verdicts = self._files.verdicts()
        for rank, beat in heartbeats.items():
            if verdicts[rank] is None and self._processes.is_alive(beat.pid):
                self._processes.signal(beat.pid, signal.SIGUSR1)

    def keep_stacks(self) -> None:
        self._diagnosis.keep_stacks()

    def stop(self) -> None:
        end_s = time.monotonic() + KILL_S
        while kill_marked(MARK_VARIABLE, self._mark) and time.monotonic() < end_s:
            time.sleep(0.02)
        self._launcher.wait()
        self._is_ended = True


class StartMilestones:
    """Records in the journal how far the ranks have started, which shows what a restart costs."""

    def __init__(self, round_number: int, num_ranks: int, record: Callable[..., None]) -> None:
        self._round_number, self._num_ranks, self._record = round_number, num_ranks, record
        self._passed: list[Event] = []
        self._first_step = 0

    def note(self, heartbeats: Mapping[int, Beat]) -> None:
        """Record each milestone once, when all ranks have reached it."""
        if len(heartbeats) < self._num_ranks or Event.FIRST_STEP in self._passed:
            return
        least = min(beat.phase if beat.step == 0 else Phase.DATA for beat in heartbeats.values())
        step = min(beat.step for beat in heartbeats.values())
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
                self._record(event, round=self._round_number, step=step)
                self._first_step = step
