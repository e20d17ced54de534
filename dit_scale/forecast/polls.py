"""The virtual clock, and the polls of simulated supervisors.

Event driven: a supervisor runs at one of its polls only if something that it has read has changed since, or
if a duration of its policy has elapsed. A long quiet round therefore costs nothing, and the history is the
same as if every poll were executed (a test compares the two).
"""

import heapq
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.policy import Policy
from dit_scale.elastic.supervisor import Wait
from dit_scale.forecast.timeline import SECOND, ticks

NEVER = 2**62


class EventQueue:
    """The virtual clock: actions in order of their time, then in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now = 0
        """Ticks."""
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._num_scheduled = 0

    def at(self, time: int, action: Callable[[], None]) -> None:
        """Schedule an action."""
        self._num_scheduled += 1
        heapq.heappush(self._events, (time, self._num_scheduled, action))

    def step(self, limit: int) -> bool:
        """Advance to the next action and execute it; False if there is none up to `limit`."""
        if not self._events or self._events[0][0] > limit:
            return False
        self.now, _, action = heapq.heappop(self._events)
        action()
        return True

    def seconds(self) -> float:
        """Return the virtual time in seconds."""
        return self.now / SECOND


class TimedWait(Enum):
    """What a supervisor measures a duration for: it may act although nothing has changed."""

    NODES = auto()
    """Other nodes that join, and the one that starts the round."""
    GROWTH = auto()
    """Standby nodes that could join a running round."""
    LEAVING = auto()
    """Ranks that were asked to save and exit."""
    HEARING = auto()
    """Reports of the other nodes."""
    LATE_HEARING = auto()
    """The same for a node that is not among the first judges."""
    LEASE = auto()
    """The lease of another node."""


@dataclass
class Node:
    """A node with its supervisor, which is suspended between two polls; times in ticks."""

    name: str
    supervisor: Wait | None = None
    """None while the node is lost, and after its supervisor has exited."""
    boots: int = 0
    interval: int = 0
    """Time between two polls."""
    polled_at: int = 0
    wakes_at: int = NEVER
    """When its next poll is scheduled."""
    timers: list[int] = field(default_factory=list)
    """Polls at which a duration that it measures will have elapsed."""
    notified: bool = False
    """Whether something that it has read has changed since."""
    lost_at: int = 0


class Polls:
    """Executes those polls of all supervisors at which one of them may act."""

    def __init__(
        self, queue: EventQueue, policy: Policy, every_poll: bool, on_exit: Callable[[Node, Exit], None]
    ) -> None:
        """`every_poll`: execute every poll, skip none. `on_exit` is called after a supervisor has exited."""
        self._queue, self._every_poll, self._on_exit = queue, every_poll, on_exit
        self._interval = ticks(policy.look_s)
        self._durations = _durations(policy)
        self._readers: defaultdict[tuple[str, object], dict[str, Node]] = defaultdict(dict)
        self._polling: Node | None = None
        self._acted = False
        self._timed_waits: set[TimedWait] = set()

    def start(self, node: Node, supervisor: Wait, at: int) -> None:
        """Start a supervisor, which polls first at `at`."""
        node.supervisor = supervisor
        node.boots += 1
        node.interval, node.polled_at = self._interval, at
        node.timers, node.notified, node.wakes_at = [], True, NEVER
        self._wake(node, at)

    # Called while a supervisor polls

    def reads(self, topic: str, key: object) -> None:
        """Note that the supervisor depends on this, and wake it when it changes."""
        if self._polling is not None:
            self._readers[topic, key][self._polling.name] = self._polling

    def acts(self) -> None:
        """Note that the supervisor changes something."""
        self._acted = True

    def measures(self, wait: TimedWait) -> None:
        """Note that the supervisor waits for a duration to elapse."""
        self._timed_waits.add(wait)

    # Called by whatever changes

    def notify(self, topic: str, key: object) -> None:
        """Wake the readers of something that has changed at their next polls."""
        for node in self._readers.pop((topic, key), {}).values():
            if node.supervisor is not None:
                node.notified = True
                polls = max(1, -(-(self._queue.now - node.polled_at) // node.interval))
                self._wake(node, node.polled_at + polls * node.interval)

    def _wake(self, node: Node, at: int) -> None:
        if at < node.wakes_at:
            node.wakes_at = at
            self._queue.at(at, lambda: self._poll(node, at))

    def _poll(self, node: Node, at: int) -> None:
        """Execute a poll of a supervisor, and schedule the next one at which it may act."""
        if node.wakes_at != at or node.supervisor is None:
            return
        notified, node.notified = node.notified, False
        node.polled_at, node.wakes_at = at, NEVER
        self._polling, self._acted, self._timed_waits = node, False, set()
        try:
            node.interval = max(1, ticks(next(node.supervisor)) - at)
        except StopIteration as exited:
            node.supervisor = None
            self._on_exit(node, exited.value)
            return
        finally:
            self._polling = None
        if self._acted:
            node.timers = []
        if not (self._acted or notified):
            self._timed_waits &= {TimedWait.LEASE}
        if self._timed_waits:
            durations = {duration for wait in self._timed_waits for duration in self._durations[wait]}
            node.timers += [at + (duration // node.interval + 1) * node.interval for duration in durations]
        node.timers = [timer for timer in node.timers if timer > at]
        self._wake(node, at + node.interval if self._every_poll else min(node.timers, default=NEVER))


def _durations(policy: Policy) -> dict[TimedWait, list[int]]:
    """Return the durations in ticks after which a waiting supervisor may act."""
    patience_s, hearing_s = policy.patience_s, policy.lease_s / 2
    settle = (policy.settle_s, policy.save_s)
    seconds = {
        TimedWait.NODES: (patience_s, *settle, *(patience_s + time_s for time_s in settle), policy.gather_s),
        TimedWait.GROWTH: (policy.grow_s,),
        TimedWait.LEAVING: (policy.save_s,),
        TimedWait.HEARING: (hearing_s / 5, hearing_s),
        TimedWait.LATE_HEARING: (2 * hearing_s, 2.2 * hearing_s, 3 * hearing_s),
        TimedWait.LEASE: (policy.lease_s,),
    }
    return {wait: [ticks(duration_s) for duration_s in durations] for wait, durations in seconds.items()}
