"""What a simulated supervisor sees of the world: a board in memory, and ranks that are arithmetic."""

from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, Protocol

from dit_scale.elastic.board import Board, Ending, Joined, Member, Reason, Round
from dit_scale.elastic.hearing import JUDGES
from dit_scale.elastic.node.deadlines import Deadlines, Standing
from dit_scale.elastic.node.outcomes import GroupOutcome
from dit_scale.forecast.timeline import SECOND, FailureKind, Job
from dit_scale.heartbeat import MEASURED_STEPS, Beat, Phase

KEPT_ROUNDS = 4
"""Nobody asks for older ones, and those of thousands of nodes would fill the memory."""


class Awaits(Enum):
    """What a supervisor looks at the clock for, though nothing else changes."""

    NODES = auto()
    """Others that join, and the one that is to begin the round."""
    GROWTH = auto()
    LEAVING = auto()
    """Ranks that were asked to save."""
    HEARING = auto()
    LATE_HEARING = auto()
    """Of a node that is none of the first judges."""
    LEASE = auto()


class VirtualCluster(Protocol):
    """What both need of the simulation."""

    now: int
    """Ticks."""
    job: Job | None
    """Of the newest round."""

    def reads(self, what: str, which: object) -> None:
        """The supervisor that runs is to be resumed when this changes."""

    def tell(self, what: str, which: object) -> None:
        """Something changed: its readers are resumed at their next polls."""

    def tell_groups(self, job: Job) -> None:
        """The ranks of a round may look different from now on."""

    def acts(self) -> None:
        """The supervisor that runs does something."""

    def awaits(self, what: Awaits) -> None:
        """The supervisor that runs measures a time."""

    def at(self, time: int, action: Callable[[], None]) -> None:
        """Have something happen."""

    def begin(self, round_: Round) -> None:
        """A round was sealed."""

    def end(self, ending: Ending) -> None:
        """A round was ended."""

    def signs_until(self, node: str) -> int:
        """When a node renewed its lease last."""


class VirtualBoard(Board):
    """The objects in memory; supervisors that read them are told of changes."""

    def __init__(self, world: VirtualCluster) -> None:
        self.url = "the simulation"
        self._world = world
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
            names = names.copy()  # readers keep the list to compare with
            insort(names, member.node)
            self._joined[number] = names
        self._left[number] -= {member.node}
        self._world.acts()
        self._world.tell("joined", number)

    def withdraw(self, number: int, member: Member) -> None:
        self._members[number].pop(member.node, None)
        self._joined[number] = [name for name in self._joined.get(number, []) if name != member.node]
        self._left[number] |= {member.node}
        self._world.tell("joined", number)

    def joined(self, number: int) -> Joined:
        self._world.reads("joined", number)
        self._world.awaits(Awaits.NODES)
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
        self._world.begin(round_)
        self._world.acts()
        self._world.tell("sealed", round_.number)
        return True

    def sealed(self, number: int) -> Round | None:
        self._world.reads("sealed", number)
        return self._rounds.get(number)

    def end(self, ending: Ending) -> None:
        if ending.round not in self._endings:
            self._endings[ending.round] = ending
            self._world.end(ending)
            self._world.tell("ending", ending.round)

    def ending(self, number: int) -> Ending | None:
        self._world.reads("ending", number)
        return self._endings.get(number)

    def report(self, number: int, node: str, tree: dict[str, Any]) -> bool:
        self._reports[number][node] = tree
        self._world.tell("reports", number)
        return True

    def take_back(self, number: int, node: str) -> None:
        self._reports[number].pop(node, None)
        self._world.tell("reports", number)

    def reports(self, number: int) -> dict[str, dict[str, Any]]:
        self._world.reads("reports", number)
        return self._reports[number]

    def renew_lease(self, node: str, count: int) -> None:
        """Leases are answered from what is known of the nodes."""

    def lease(self, node: str) -> int:
        self._world.reads("lease", node)
        sign = self._world.signs_until(node)
        if sign < self._world.now:
            self._world.awaits(Awaits.LEASE)
        return sign


class VirtualGroup:
    """The ranks of one node in one round; they start when it is made."""

    def __init__(self, world: VirtualCluster, node: str, index: int, deadlines: Deadlines) -> None:
        job = world.job
        assert job is not None
        self._world, self._node, self._deadlines = world, node, deadlines
        self._job: Job | None = job
        self._hearing = Awaits.HEARING if index < JUDGES else Awaits.LATE_HEARING
        self._world.acts()
        if index == 0:
            self._world.awaits(Awaits.GROWTH)
        job.start(self._node, self._world.now)
        self._expect_end(job)

    def poll(self) -> GroupOutcome | None:
        job, now = self._job, self._world.now
        self._world.reads("group", self._node)
        if job is None:
            return GroupOutcome(Reason.LEAVING, "ended before their first step")
        if job.ended_at is not None:
            self._world.awaits(Awaits.LEAVING)
        halt = job.halt
        if halt is not None:
            if halt.kind == FailureKind.CRASH and halt.node == self._node:
                return GroupOutcome(Reason.FAILED, "a rank was killed")
            if self._is_broken(job):
                self._world.awaits(self._hearing)
                return GroupOutcome(Reason.FAILED, "its peer is gone", first_hand=False)
            found = self._standing(job)
            if not found.is_overdue:
                return None
            self._world.awaits(self._hearing)
            return GroupOutcome(Reason.HUNG, str(found), first_hand=False)
        if job.over_at is not None and now >= job.over_at:
            return GroupOutcome(Reason.DONE if job.is_done() else Reason.LEAVING, "left")
        return None

    def quiet(self) -> tuple[Standing, ...]:
        job = self._job
        if job is None or job.halt is None or self._is_broken(job):
            return ()
        found = self._standing(job)
        return (found,) if found.age_s > found.quiet_s else ()

    def ask_to_stop(self) -> None:
        job = self._job
        if job is None or job.trains_at is None or self._world.now < job.trains_at:
            self.stop()
        elif not job.is_asked:
            job.ask(self._world.now)
            self._expect_end(job)

    def keep_stacks(self) -> None:
        """There are none."""

    def stop(self) -> None:
        if self._job is not None:
            self._job.running.discard(self._node)
        self._job = None

    def _is_broken(self, job: Job) -> bool:
        broken_at = job.broken_at()
        return broken_at is not None and self._world.now >= broken_at

    def _standing(self, job: Job) -> Standing:
        assert job.halt is not None
        beat = last_beat(job)
        age_s = (self._world.now - job.halt.at) / SECOND
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
            self._world.at(job.over_at, lambda: self._world.tell_groups(job))


def last_beat(job: Job) -> Beat:
    """What all ranks of a halted job said last."""
    assert job.halt is not None
    at = job.halt.at
    if job.is_restoring(at):
        phase = Phase.RESTORE
    elif job.trains_at is None or at < job.trains_at:
        phase = Phase.START
    else:
        phase = Phase.COMPUTE
    steps = job.steps(at)
    return Beat(1, phase, steps, 0.0, job.step / SECOND if steps >= MEASURED_STEPS else 0.0)
