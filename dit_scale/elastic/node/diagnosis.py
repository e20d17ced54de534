"""Which ranks of this node make no progress, and which of them wait for others: one round, seen from outside.

Heartbeats tell how long ago a rank was last seen, the kernel whether its process is stopped, and its stacks
whether it is inside a collective.
"""

import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from dit_scale.elastic.node.deadlines import Deadlines, Standing, standings_of
from dit_scale.elastic.node.processes import ProcessTable
from dit_scale.elastic.node.rank_files import RankFiles
from dit_scale.elastic.node.stacks import STACK_SIGNAL, StackArchive, ask_for_stacks, is_in_collective
from dit_scale.heartbeat import Phase
from dit_scale.journal import Event
from dit_scale.lines import Say

BLIND_S = 5.0
"""After a longer pause between two looks the supervisor was stopped itself, and its ranks perhaps with it."""


class Diagnosis:
    """Judges the progress of the ranks of one node in one round."""

    def __init__(
        self,
        *,
        round_number: int,
        files: RankFiles,
        processes: ProcessTable,
        deadlines: Deadlines,
        archive: StackArchive,
        record: Callable[..., None],
        say: Say,
    ) -> None:
        self._round_number, self._files, self._processes = round_number, files, processes
        self._deadlines, self._archive, self._record, self._say = deadlines, archive, record, say
        self._looked_s = self._sighted_s = time.monotonic()
        self._stacks: dict[int, str] = {}
        self._places: list[tuple[int, Phase, int]] = []
        """Rank, phase and step of the ranks when their stacks were last asked for."""
        self._reported_stalls: set[tuple[int, int]] = set()
        """Rank and step."""

    def standings(self) -> list[Standing]:
        """Return where the ranks without a verdict stand."""
        now_s = time.monotonic()
        if now_s - self._looked_s > BLIND_S:
            self._sighted_s = now_s
        self._looked_s = now_s
        heartbeats = self._files.heartbeats()
        ranks = standings_of(
            {rank: heartbeats.get(rank) for rank in self._files.ranks},
            self._files.verdicts(),
            self._deadlines,
            now_s=now_s,
            since_s=self._sighted_s,
            is_stopped=self._processes.is_stopped,
        )
        waiting = self.waiting([one for one in ranks if one.phase >= Phase.DATA])
        return [replace(one, waits=one.rank in waiting) for one in ranks]

    def waiting(self, training: Sequence[Standing]) -> set[int]:
        """Return the ranks inside a collective, judging by stacks that are requested once a rank is overdue.

        Among ranks in the same phase of the same step, these wait for the others. Stacks are requested again
        whenever a rank has moved on. Ranks that have exited since keep their last stacks.
        """
        if training and not any(one.is_overdue for one in training):
            self._stacks, self._places = {}, []
            return set()
        places = [(one.rank, one.phase, one.step) for one in training]
        if places != self._places:
            self._stacks |= self._ask(training)
            self._places = places
        return {rank for rank, text in self._stacks.items() if is_in_collective(text)}

    def report_stalls(self, standings: Sequence[Standing]) -> None:
        """Report every rank that waits for data for longer than a step takes, once per wait.

        The data may still arrive. The rank gives up by its own deadline.
        """
        stalled = [
            one
            for one in standings
            if one.phase == Phase.DATA
            and one.age_s > one.quiet_s
            and (one.rank, one.step) not in self._reported_stalls
        ]
        if not stalled:
            return
        self._archive.write(self._stacks or self._ask(standings))
        for one in stalled:
            self._reported_stalls.add((one.rank, one.step))
            self._record(Event.STALLED, round=self._round_number, rank=one.rank, step=one.step, text=str(one))
            self._say(f"{one}; its deadline is {one.limit_s:g} s. Stacks are in {self._archive.folder}")

    def keep_stacks(self) -> None:
        """Write down what the ranks are doing now, or were doing before they exited.

        A rank exits soon after another node kills its own, so its earlier stacks show where it stood.
        """
        pids = {rank: beat.pid for rank, beat in self._files.heartbeats().items()}

        def wake_and_ask(rank: int) -> None:
            self._processes.signal(pids[rank], STACK_SIGNAL)
            # A stopped process writes its stacks as the first thing after it is resumed.
            self._processes.signal(pids[rank], signal.SIGCONT)

        now = ask_for_stacks(self._files.folder, pids, wake_and_ask)
        self._archive.write(now | self._stacks)

    def _ask(self, standings: Iterable[Standing]) -> dict[int, str]:
        """Return the stacks of those that are not stopped."""
        pids = {one.rank: one.pid for one in standings if one.pid and not one.stopped}
        return ask_for_stacks(
            self._files.folder, pids, lambda rank: self._processes.signal(pids[rank], STACK_SIGNAL)
        )
