"""A run of thousands of nodes on a virtual clock: real supervisors over a virtual board and virtual ranks.

Event driven. A supervisor is resumed, at one of the times at which it would have polled, when something
that it read has changed, or when one of the times of its policy has gone by since. So a long quiet round
costs nothing, and what happens is the same as with every poll taken (a test compares the two).
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from dit_scale.elastic.board import Ending, Member, Reason, Round
from dit_scale.elastic.local_node import Dependencies
from dit_scale.elastic.node.deadlines import Deadlines
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.policy import Policy
from dit_scale.elastic.supervisor import Supervisor, Wait
from dit_scale.forecast.timeline import SECOND, Costs, FailureKind, Halt, Job, Ledger, Use, ticks
from dit_scale.forecast.virtual import Awaits, VirtualBoard, VirtualGroup, last_beat

DAY_S = 86400.0
NEVER = 2**62


@dataclass(frozen=True)
class Failure:
    at_s: float
    node: int
    kind: FailureKind


@dataclass(frozen=True)
class SimulationSetup:
    """A run, its nodes and what things take."""

    nodes: int
    """Of the full world."""
    steps: int
    every_steps: int
    """Steps between two checkpoints."""
    spares: int = 0
    """Nodes more, that wait to take over."""
    costs: Costs = field(default_factory=Costs)
    """Of the full world; with fewer nodes a step takes longer in proportion."""
    measured: Mapping[int, Costs] = field(default_factory=dict)
    """Of worlds of fewer nodes, by their number, where they were measured."""
    policy: Policy = field(default_factory=Policy)
    """Its `max_nodes` is set to `nodes`."""
    deadlines: Deadlines = field(default_factory=Deadlines)
    repair_s: float = DAY_S
    limit_s: float = 1000 * DAY_S
    """A run that is not over then ends there."""
    polls: bool = False
    """Take every single poll; slow, to compare with."""

    def costs_of(self, nodes: int) -> Costs:
        """What things take in a world of so many nodes."""
        slower = replace(self.costs, step_s=self.costs.step_s * self.nodes / nodes)
        return self.measured.get(nodes, slower)


@dataclass(frozen=True)
class SimulationResult:
    """How a run went."""

    code: Exit | None
    """None: it was not over at its limit."""
    wall_s: float
    ledger_s: dict[Use, float]
    """Seconds by use; the sum is the wall clock."""
    ledger: Ledger
    """The same in ticks, in which the sum is exact."""
    committed_step: int
    failures: Counter[FailureKind]
    endings: Counter[Reason]
    """Rounds by the reason of their end."""

    @property
    def goodput(self) -> float:
        """Share of the wall clock that the kept steps would take a full world."""
        return self.ledger[Use.PRODUCTIVE] / sum(self.ledger.values())


def poisson(
    nodes: int, per_1000_node_days: float, shares: dict[FailureKind, float], seed: int
) -> Iterator[Failure]:
    """Failures of a run's nodes, spares included, without memory; `shares` of the kinds sum to 1."""
    draws = np.random.Generator(np.random.Philox(seed))
    kinds, weights = list(shares), list(shares.values())
    mean_s = DAY_S * 1000 / (per_1000_node_days * nodes) if per_1000_node_days else float("inf")
    at_s = 0.0
    while True:
        at_s += draws.exponential() * mean_s
        kind = kinds[int(draws.choice(len(kinds), p=weights))]
        yield Failure(at_s, int(draws.integers(nodes)), kind)


def simulate(setup: SimulationSetup, failures: Iterable[Failure] = ()) -> SimulationResult:
    """Run it to its end."""
    return Simulation(setup, iter(failures)).run()


@dataclass
class Node:
    """A node and its supervisor, suspended; times in ticks."""

    name: str
    life: Wait | None = None
    boots: int = 0
    poll: int = 0
    resumed_at: int = 0
    wakes_at: int = NEVER
    timers: list[int] = field(default_factory=list)
    told: bool = False
    """Something that it read has changed since."""
    lost_at: int = 0


class Simulation:
    """Nodes, their board, the job of the newest round, and what will happen."""

    def __init__(self, setup: SimulationSetup, failures: Iterator[Failure]) -> None:
        self._setup, self._failures = setup, failures
        self._policy = Policy(**{**vars(setup.policy), "max_nodes": setup.nodes})
        self._poll = ticks(self._policy.look_s)
        self._times = _times(self._policy)
        self.now = 0
        self.nodes = {name: Node(name) for name in (f"n{i:05d}" for i in range(setup.nodes + setup.spares))}
        self._names = list(self.nodes)
        self.board = VirtualBoard(self)
        self.job: Job | None = None
        self._current: Node | None = None
        self._acted = False
        self._awaited: set[Awaits] = set()
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._readers: defaultdict[tuple[str, object], dict[str, Node]] = defaultdict(dict)
        self._ledger: Ledger = dict.fromkeys(Use, 0)
        self._counted_to = 0
        self._counts: Counter[FailureKind] = Counter()
        self._reasons: Counter[Reason] = Counter()
        self._code: Exit | None = None
        self._running = len(self.nodes)

    def run(self) -> SimulationResult:
        for i, node in enumerate(self.nodes.values()):
            self._boot(node, i * self._poll // len(self.nodes))
        self._next_failure()
        limit = ticks(self._setup.limit_s)
        while self._events and self._code is None and self._events[0][0] <= limit:
            self.now, _, action = heapq.heappop(self._events)
            action()
        if self._code is None:
            self.now = limit
        self._account()
        for node in self.nodes.values():
            if node.life is not None:
                node.life.close()
        return SimulationResult(
            self._code,
            self.now / SECOND,
            {use: spent / SECOND for use, spent in self._ledger.items()},
            self._ledger,
            self.committed_step(),
            self._counts,
            self._reasons,
        )

    # What supervisors see and do

    def seconds(self) -> float:
        return self.now / SECOND

    def committed_step(self) -> int:
        if self.job is None:
            return -1
        at = self.job.next_commit(self.now)
        if self._current is not None and at is not None:
            self.reads("committed", 0)
            self.at(at, lambda: self.tell("committed", 0))
        return self.job.committed(self.now)

    def reads(self, what: str, which: object) -> None:
        if self._current is not None:
            self._readers[what, which][self._current.name] = self._current

    def tell(self, what: str, which: object) -> None:
        for node in self._readers.pop((what, which), {}).values():
            if node.life is not None:
                node.told = True
                polls = max(1, -(-(self.now - node.resumed_at) // node.poll))
                self._wake(node, node.resumed_at + polls * node.poll)

    def acts(self) -> None:
        self._acted = True

    def awaits(self, what: Awaits) -> None:
        self._awaited.add(what)

    def at(self, time: int, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (time, self._order, action))

    def tell_groups(self, job: Job) -> None:
        for node in sorted(job.running):
            self.tell("group", node)

    def signs_until(self, node: str) -> int:
        return self.now if self.nodes[node].life is not None else self.nodes[node].lost_at

    def begin(self, round_: Round) -> None:
        self._account()
        setup = self._setup
        costs = setup.costs_of(len(round_.members))
        self.job = Job(costs, setup.costs.step_s, setup.every_steps, setup.steps, round_, self.now)
        for member in round_.members:
            if self.nodes[member.node].life is None:
                self._halt(member.node, FailureKind.LOSS)

    def end(self, ending: Ending) -> None:
        self._reasons[ending.reason] += 1
        if self.job is not None:
            self.job.ended_at = self.now

    # What happens

    def _account(self) -> None:
        """Book the time since the last time."""
        if self.job is None:
            self._ledger[Use.WAIT] += self.now
        else:
            for use, spent in self.job.account(self.now).items():
                self._ledger[use] += spent

    def _boot(self, node: Node, at: int) -> None:
        setup = self._setup
        node.boots += 1
        me = Member(node.name, str(node.boots), node.name, 1, 1, "")
        dependencies = Dependencies(
            clock=self.seconds,
            committed_step=self.committed_step,
            is_wanted_back=lambda: False,
            start_group=lambda round_, index: VirtualGroup(self, node.name, index, setup.deadlines),
            say=lambda text: None,
        )
        node.life = Supervisor(me, self.board, self._policy, dependencies).run()
        node.poll, node.resumed_at = self._poll, at
        node.timers, node.told, node.wakes_at = [], True, NEVER
        self._wake(node, at)

    def _wake(self, node: Node, at: int) -> None:
        if at < node.wakes_at:
            node.wakes_at = at
            self.at(at, lambda: self._resume(node, at))

    def _resume(self, node: Node, at: int) -> None:
        """Let a supervisor look around, and find out when it must do so again."""
        if node.wakes_at != at or node.life is None:
            return
        told, node.told = node.told, False
        node.resumed_at, node.wakes_at = at, NEVER
        self._current, self._acted, self._awaited = node, False, set()
        try:
            node.poll = max(1, ticks(next(node.life)) - at)
        except StopIteration as end:
            self._leave(node, end.value)
            return
        finally:
            self._current = None
        if self._acted:
            node.timers = []
        if not (self._acted or told):
            self._awaited &= {Awaits.LEASE}
        if self._awaited:
            times = {time for what in self._awaited for time in self._times[what]}
            node.timers += [at + (time // node.poll + 1) * node.poll for time in times]
        node.timers = [timer for timer in node.timers if timer > at]
        self._wake(node, at + node.poll if self._setup.polls else min(node.timers, default=NEVER))

    def _leave(self, node: Node, code: Exit) -> None:
        """A supervisor ended."""
        node.life = None
        self._running -= 1
        if code in (Exit.DONE, Exit.DO_NOT_RESTART) or self._running == 0:
            self._code = code

    def _next_failure(self) -> None:
        failure = next(self._failures, None)
        if failure is not None and failure.at_s < self._setup.limit_s:
            self.at(ticks(failure.at_s), lambda: self._fail(failure))

    def _fail(self, failure: Failure) -> None:
        node = self.nodes[self._names[failure.node]]
        if node.life is not None:
            self._counts[failure.kind] += 1
            self._halt(node.name, failure.kind)
            if failure.kind in (FailureKind.LOSS, FailureKind.DEATH):
                self._lose(node)
        self._next_failure()

    def _halt(self, node: str, kind: FailureKind) -> None:
        """The ranks of the round that runs stop, when this node is one of its members."""
        job = self.job
        if job is None or job.halt is not None or job.round.index_of(node) is None:
            return
        if job.over_at is not None and job.over_at <= self.now:
            return
        if job.ended_at is not None and job.over_at is None:
            return
        job.halt = Halt(self.now, node, kind)
        self.tell("group", node)
        if (broken_at := job.broken_at()) is not None:
            self.at(broken_at, lambda: self.tell_groups(job))
        beat, deadlines = last_beat(job), self._setup.deadlines
        for limit_s in {deadlines.quiet(beat), deadlines.of(beat)}:
            self.at(self.now + ticks(limit_s) + 1, lambda: self.tell_groups(job))

    def _lose(self, node: Node) -> None:
        life, node.life = node.life, None
        assert life is not None
        life.close()
        node.lost_at = self.now
        self._running -= 1
        self.tell("lease", node.name)
        self.at(self.now + ticks(self._setup.repair_s), lambda: self._repaired(node))

    def _repaired(self, node: Node) -> None:
        self._running += 1
        self._boot(node, self.now)


def _times(policy: Policy) -> dict[Awaits, list[int]]:
    """After which times a supervisor that waits for something may do what it did not before."""
    patience_s, hearing_s = policy.patience_s, policy.lease_s / 2
    settle = (policy.settle_s, policy.save_s)
    seconds = {
        Awaits.NODES: (patience_s, *settle, *(patience_s + time_s for time_s in settle), policy.gather_s),
        Awaits.GROWTH: (policy.grow_s,),
        Awaits.LEAVING: (policy.save_s,),
        Awaits.HEARING: (hearing_s / 5, hearing_s),
        Awaits.LATE_HEARING: (2 * hearing_s, 2.2 * hearing_s, 3 * hearing_s),
        Awaits.LEASE: (policy.lease_s,),
    }
    return {what: [ticks(time_s) for time_s in times] for what, times in seconds.items()}
