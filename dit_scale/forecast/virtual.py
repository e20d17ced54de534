"""What a simulated supervisor sees: a board in memory, and ranks that are arithmetic."""

from bisect import insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

from dit_scale.elastic.board import Board, Ending, Joined, Member, Reason, Round
from dit_scale.elastic.hearing import JUDGES
from dit_scale.elastic.node.deadlines import Deadlines, Standing
from dit_scale.elastic.node.outcomes import GroupOutcome
from dit_scale.forecast.polls import EventQueue, Polls, TimedWait
from dit_scale.forecast.timeline import SECOND, FailureKind, Job
from dit_scale.heartbeat import MEASURED_STEPS, Beat, Phase

KEPT_ROUNDS = 4
"""Older rounds are never read; for thousands of nodes they would fill the memory."""


class VirtualCluster(Protocol):
    """What the board and the ranks need of the simulation."""

    queue: EventQueue
    polls: Polls
    job: Job | None
    """The ranks of the newest round."""

    def begin(self, round_: Round) -> None:
        """Start a round that was sealed."""

    def end(self, ending: Ending) -> None:
        """End a round."""

    def notify_groups(self, job: Job) -> None:
        """Notify supervisors that the ranks of a round may look different from now on."""

    def last_sign(self, node: str) -> int:
        """Return when a node last renewed its lease."""


class VirtualBoard(Board):
    """The shared objects in memory; supervisors that have read one are notified when it changes."""

    def __init__(self, cluster: VirtualCluster) -> None:
        self.url = "the simulation"
        self._cluster, self._polls = cluster, cluster.polls
        self._newest = 0
        self._members: defaultdict[int, dict[str, Member]] = defaultdict(dict)
        self._joined: dict[int, list[str]] = {}
        self._left: defaultdict[int, frozenset[str]] = defaultdict(frozenset)
        self._rounds: dict[int, Round] = {}
        self._endings: dict[int, Ending] = {}
        self._reports: defaultdict[int, dict[str, dict[str, Any]]] = defaultdict(dict)

    def newest(self) -> int:
        return self._newest

    def join(self, number: int, member: Member) -> None:
        self._members[number][member.node] = member
        names = self._joined.get(number, [])
        if member.node not in names:
            names = names.copy()  # readers keep the old list to compare it with
            insort(names, member.node)
            self._joined[number] = names
        self._left[number] -= {member.node}
        self._polls.acts()
        self._polls.notify("joined", number)

    def withdraw(self, number: int, member: Member) -> None:
        self._members[number].pop(member.node, None)
        self._joined[number] = [name for name in self._joined.get(number, []) if name != member.node]
        self._left[number] |= {member.node}
        self._polls.notify("joined", number)

    def joined(self, number: int) -> Joined:
        self._polls.reads("joined", number)
        self._polls.measures(TimedWait.NODES)
        return Joined(0, self._joined.get(number, []), self._left[number])

    def members(self, number: int, start: int, nodes: Sequence[str]) -> list[Member | None]:
        return [self._members[number].get(node) for node in nodes]

    def seal(self, round_: Round) -> bool:
        if round_.number in self._rounds:
            return False
        self._rounds[round_.number] = round_
        self._newest = max(self._newest, round_.number)
        old = round_.number - KEPT_ROUNDS
        for kept in (self._members, self._joined, self._left, self._rounds, self._endings, self._reports):
            kept.pop(old, None)
        self._cluster.begin(round_)
        self._polls.acts()
        self._polls.notify("sealed", round_.number)
        return True

    def sealed(self, number: int) -> Round | None:
        self._polls.reads("sealed", number)
        return self._rounds.get(number)

    def end(self, ending: Ending) -> None:
        if ending.round not in self._endings:
            self._endings[ending.round] = ending
            self._cluster.end(ending)
            self._polls.notify("ending", ending.round)

    def ending(self, number: int) -> Ending | None:
        self._polls.reads("ending", number)
        return self._endings.get(number)

    def report(self, number: int, node: str, tree: dict[str, Any]) -> bool:
        self._reports[number][node] = tree
        self._polls.notify("reports", number)
        return True

    def take_back(self, number: int, node: str) -> None:
        self._reports[number].pop(node, None)
        self._polls.notify("reports", number)

    def reports(self, number: int) -> dict[str, dict[str, Any]]:
        self._polls.reads("reports", number)
        return self._reports[number]

    def renew_lease(self, node: str, count: int) -> None:
        """Do nothing: `lease` asks the simulation."""

    def lease(self, node: str) -> int:
        self._polls.reads("lease", node)
        sign = self._cluster.last_sign(node)
        if sign < self._cluster.queue.now:
            self._polls.measures(TimedWait.LEASE)
        return sign


class VirtualGroup:
    """The ranks of one node in one round; they start when it is made."""

    def __init__(self, cluster: VirtualCluster, node: str, index: int, deadlines: Deadlines) -> None:
        job = cluster.job
        assert job is not None
        self._cluster, self._polls, self._node, self._deadlines = cluster, cluster.polls, node, deadlines
        self._job: Job | None = job
        self._hearing = TimedWait.HEARING if index < JUDGES else TimedWait.LATE_HEARING
        self._polls.acts()
        if index == 0:
            self._polls.measures(TimedWait.GROWTH)
        job.start(self._node, self._cluster.queue.now)
        self._expect_end(job)

    def poll(self) -> GroupOutcome | None:
        job, now = self._job, self._cluster.queue.now
        self._polls.reads("group", self._node)
        if job is None:
            return GroupOutcome(Reason.LEAVING, "exited before their first step")
        if job.ended_at is not None:
            self._polls.measures(TimedWait.LEAVING)
        halt = job.halt
        if halt is not None:
            if halt.kind == FailureKind.CRASH and halt.node == self._node:
                return GroupOutcome(Reason.FAILED, "a rank was killed")
            if self._is_broken(job):
                self._polls.measures(self._hearing)
                return GroupOutcome(Reason.FAILED, "its peer exited", first_hand=False)
            standing = self._standing(job)
            if not standing.is_overdue:
                return None
            self._polls.measures(self._hearing)
            return GroupOutcome(Reason.HUNG, str(standing), first_hand=False)
        if job.over_at is not None and now >= job.over_at:
            return GroupOutcome(Reason.DONE if job.is_done else Reason.LEAVING, "exited")
        return None

    def quiet(self) -> tuple[Standing, ...]:
        job = self._job
        if job is None or job.halt is None or self._is_broken(job):
            return ()
        standing = self._standing(job)
        return (standing,) if standing.age_s > standing.quiet_s else ()

    def ask_to_stop(self) -> None:
        job = self._job
        if job is None or job.trains_at is None or self._cluster.queue.now < job.trains_at:
            self.stop()
        elif not job.is_asked:
            job.ask_to_stop(self._cluster.queue.now)
            self._expect_end(job)

    def keep_stacks(self) -> None:
        """Do nothing: virtual ranks have no stacks."""

    def stop(self) -> None:
        if self._job is not None:
            self._job.running.discard(self._node)
        self._job = None

    def _is_broken(self, job: Job) -> bool:
        broken_at = job.broken_at()
        return broken_at is not None and self._cluster.queue.now >= broken_at

    def _standing(self, job: Job) -> Standing:
        assert job.halt is not None
        beat = last_beat(job)
        age_s = (self._cluster.queue.now - job.halt.at) / SECOND
        stopped = job.halt.kind == FailureKind.STOP and job.halt.node == self._node
        quiet_s = self._deadlines.quiet(beat)
        limit_s = quiet_s if stopped else self._deadlines.of(beat)
        return Standing(
            rank=0,
            pid=beat.pid,
            phase=beat.phase,
            step=beat.step,
            age_s=age_s,
            limit_s=limit_s,
            quiet_s=quiet_s,
            stopped=stopped,
        )

    def _expect_end(self, job: Job) -> None:
        if job.over_at is not None:
            self._cluster.queue.at(job.over_at, lambda: self._cluster.notify_groups(job))


def last_beat(job: Job) -> Beat:
    """Return the last heartbeat of the ranks of a halted job."""
    assert job.halt is not None
    at = job.halt.at
    if job.is_restoring(at):
        phase = Phase.RESTORE
    elif job.trains_at is None or at < job.trains_at:
        phase = Phase.START
    else:
        phase = Phase.COMPUTE
    steps = job.steps(at)
    return Beat(1, phase, steps, 0.0, job.schedule.step / SECOND if steps >= MEASURED_STEPS else 0.0)
