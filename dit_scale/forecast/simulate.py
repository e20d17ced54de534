"""Simulate a run of up to thousands of nodes on a virtual clock.

The supervisors are the real ones; their board is in memory, and their ranks are arithmetic.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from dit_scale.elastic.board import Ending, Member, Reason, Round
from dit_scale.elastic.local_node import Dependencies
from dit_scale.elastic.node.deadlines import Deadlines
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.policy import Policy
from dit_scale.elastic.supervisor import Supervisor
from dit_scale.forecast.polls import EventQueue, Node, Polls
from dit_scale.forecast.timeline import SECOND, Costs, FailureKind, Halt, Job, SaveSchedule, ticks
from dit_scale.forecast.virtual import VirtualBoard, VirtualGroup, last_beat
from dit_scale.ledger import Heading, Ledger

DAY_S = 86400.0
SIMULATED = (
    Heading.WAITING,
    Heading.RESTART,
    Heading.REPLAYED,
    Heading.PRODUCTIVE,
    Heading.DEGRADED,
    Heading.CHECKPOINT,
    Heading.RESTORE,
    Heading.DETECT,
)
"""The headings that a simulation can tell apart."""


@dataclass(frozen=True)
class Failure:
    """A failure of one node."""

    at_s: float
    node: int
    kind: FailureKind


@dataclass(frozen=True)
class SimulationSetup:
    """A run, its nodes and its durations."""

    nodes: int
    """Nodes that train, without standby nodes."""
    steps: int
    every_steps: int
    """Steps between two checkpoints."""
    spares: int = 0
    """Standby nodes."""
    costs: Costs = field(default_factory=Costs)
    """Durations with all nodes; with fewer, a step takes longer in proportion."""
    measured: Mapping[int, Costs] = field(default_factory=dict)
    """Measured durations by number of nodes, where they are known."""
    policy: Policy = field(default_factory=Policy)
    """Settings of the supervisors; `max_nodes` is set to `nodes`."""
    deadlines: Deadlines = field(default_factory=Deadlines)
    repair_s: float = DAY_S
    limit_s: float = 1000 * DAY_S
    """Longest simulated time."""
    polls: bool = False
    """Execute every poll of every supervisor: slow, for comparison."""

    def costs_of(self, nodes: int) -> Costs:
        """Return the durations with this number of nodes."""
        slower = replace(self.costs, step_s=self.costs.step_s * self.nodes / nodes)
        return self.measured.get(nodes, slower)


@dataclass(frozen=True)
class SimulationResult:
    """The outcome of a simulated run."""

    code: Exit | None
    """The exit code of the run; None if it was still running at its limit."""
    ledger: Ledger
    """Where its time went, in ticks."""
    committed_step: int
    failures: Counter[FailureKind]
    endings: Counter[Reason]
    """Number of rounds by the reason for their end."""

    @property
    def wall_s(self) -> float:
        return self.ledger.wall_s

    @property
    def goodput(self) -> float:
        """Share of the wall-clock time that the productive steps would take with all nodes."""
        return self.ledger.goodput


def poisson(
    nodes: int, per_1000_node_days: float, shares: dict[FailureKind, float], seed: int
) -> Iterator[Failure]:
    """Draw failures of independent nodes, standby nodes included; `shares` of the kinds sum to 1."""
    draws = np.random.Generator(np.random.Philox(seed))
    kinds, weights = list(shares), list(shares.values())
    mean_s = DAY_S * 1000 / (per_1000_node_days * nodes) if per_1000_node_days else float("inf")
    at_s = 0.0
    while True:
        at_s += draws.exponential() * mean_s
        kind = kinds[int(draws.choice(len(kinds), p=weights))]
        yield Failure(at_s, int(draws.integers(nodes)), kind)


def simulate(setup: SimulationSetup, failures: Iterable[Failure] = ()) -> SimulationResult:
    """Simulate a run to its end, or to its limit."""
    return Simulation(setup, iter(failures)).run()


@dataclass
class Tally:
    """Sums over the run so far."""

    spent: dict[Heading, int] = field(default_factory=lambda: dict.fromkeys(SIMULATED, 0))
    """Ticks."""
    failures: Counter[FailureKind] = field(default_factory=Counter)
    endings: Counter[Reason] = field(default_factory=Counter)


class Simulation:
    """Nodes with their supervisors, the board, and the ranks of the newest round."""

    def __init__(self, setup: SimulationSetup, failures: Iterator[Failure]) -> None:
        policy = Policy(**{**vars(setup.policy), "max_nodes": setup.nodes})
        self._setup, self._failures = replace(setup, policy=policy), failures
        self.queue = EventQueue()
        self.polls = Polls(self.queue, policy, every_poll=setup.polls, on_exit=self._exited)
        self._nodes = {name: Node(name) for name in map(_name, range(setup.nodes + setup.spares))}
        self._board = VirtualBoard(self)
        self.job: Job | None = None
        self._tally = Tally()
        self._code: Exit | None = None
        self._running = len(self._nodes)

    def run(self) -> SimulationResult:
        """Simulate until the run ends or reaches its time limit."""
        interval = ticks(self._setup.policy.look_s)
        for i, node in enumerate(self._nodes.values()):
            self._boot(node, i * interval // len(self._nodes))
        self._next_failure()
        limit = ticks(self._setup.limit_s)
        while self._code is None and self.queue.step(limit):
            pass
        if self._code is None:
            self.queue.now = limit
        self._account()
        for node in self._nodes.values():
            if node.supervisor is not None:
                node.supervisor.close()
        return SimulationResult(
            code=self._code,
            ledger=Ledger(0, self.queue.now, self._tally.spent, units_per_s=SECOND),
            committed_step=self.committed_step(),
            failures=self._tally.failures,
            endings=self._tally.endings,
        )

    # What supervisors and their board ask and report

    def committed_step(self) -> int:
        """Return the newest committed step as a supervisor sees it now; -1 if there is none."""
        if self.job is None:
            return -1
        now, at = self.queue.now, self.job.next_commit(self.queue.now)
        if at is not None:
            self.polls.reads("committed", 0)
            self.queue.at(at, lambda: self.polls.notify("committed", 0))
        return self.job.committed(now)

    def last_sign(self, node: str) -> int:
        """Return the tick of the last sign of life of a node."""
        return self.queue.now if self._nodes[node].supervisor is not None else self._nodes[node].lost_at

    def begin(self, round_: Round) -> None:
        """Start the job of a sealed round."""
        self._account()
        setup = self._setup
        costs = setup.costs_of(len(round_.members))
        schedule = SaveSchedule(
            costs,
            full_step_s=setup.costs.step_s,
            every_steps=setup.every_steps,
            begin_step=max(0, round_.committed_step),
            total_steps=setup.steps,
        )
        self.job = Job(costs, schedule, round_, self.queue.now)
        for member in round_.members:
            if self._nodes[member.node].supervisor is None:
                self._halt(member.node, FailureKind.LOSS)

    def end(self, ending: Ending) -> None:
        """Count the end of a round."""
        self._tally.endings[ending.reason] += 1
        if self.job is not None:
            self.job.ended_at = self.queue.now

    def notify_groups(self, job: Job) -> None:
        """Wake the supervisors whose ranks run."""
        for node in sorted(job.running):
            self.polls.notify("group", node)

    # What happens

    def _account(self) -> None:
        """Book the time of the round that ends now, or the time before the first round."""
        now, spent = self.queue.now, self._tally.spent
        for heading, time in (self.job.account(now) if self.job else {Heading.WAITING: now}).items():
            spent[heading] += time

    def _boot(self, node: Node, at: int) -> None:
        member = Member(
            node=node.name,
            boot=str(node.boots + 1),
            address=node.name,
            port=1,
            slots=1,
            config_sha256="",
        )
        dependencies = Dependencies(
            clock=self.queue.seconds,
            committed_step=self.committed_step,
            is_wanted_back=lambda: False,
            start_group=lambda round_, index: VirtualGroup(self, node.name, index, self._setup.deadlines),
            say=lambda text: None,
        )
        supervisor = Supervisor(member, self._board, self._setup.policy, dependencies)
        self.polls.start(node, supervisor.run(), at)

    def _exited(self, node: Node, code: Exit) -> None:
        """Handle the exit of a supervisor."""
        self._running -= 1
        if code in (Exit.DONE, Exit.DO_NOT_RESTART) or self._running == 0:
            self._code = code

    def _next_failure(self) -> None:
        failure = next(self._failures, None)
        if failure is not None and failure.at_s < self._setup.limit_s:
            self.queue.at(ticks(failure.at_s), lambda: self._fail(failure))

    def _fail(self, failure: Failure) -> None:
        node = self._nodes[_name(failure.node)]
        if node.supervisor is not None:
            self._tally.failures[failure.kind] += 1
            self._halt(node.name, failure.kind)
            if failure.kind in (FailureKind.LOSS, FailureKind.DEATH):
                self._lose(node)
        self._next_failure()

    def _halt(self, node: str, kind: FailureKind) -> None:
        """Stop the ranks of the current round if this node is one of its members."""
        job, now = self.job, self.queue.now
        if job is None or job.halt is not None or job.round.index_of(node) is None:
            return
        if job.over_at is not None and job.over_at <= now:
            return
        if job.ended_at is not None and job.over_at is None:
            return
        job.halt = Halt(now, node, kind)
        self.polls.notify("group", node)
        if (broken_at := job.broken_at()) is not None:
            self.queue.at(broken_at, lambda: self.notify_groups(job))
        beat, deadlines = last_beat(job), self._setup.deadlines
        for limit_s in {deadlines.quiet(beat), deadlines.of(beat)}:
            self.queue.at(now + ticks(limit_s) + 1, lambda: self.notify_groups(job))

    def _lose(self, node: Node) -> None:
        supervisor, node.supervisor = node.supervisor, None
        assert supervisor is not None
        supervisor.close()
        node.lost_at = self.queue.now
        self._running -= 1
        self.polls.notify("lease", node.name)
        self.queue.at(node.lost_at + ticks(self._setup.repair_s), lambda: self._repaired(node))

    def _repaired(self, node: Node) -> None:
        self._running += 1
        self._boot(node, self.queue.now)


def _name(node: int) -> str:
    return f"n{node:05d}"
