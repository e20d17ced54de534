"""What the ranks of a round would do, in closed form: how far they are at any time, and where the time went.

Time is counted in whole ticks of 2^-30 s: sums are exact, and seconds made of them are exact floats.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from dit_scale.elastic.board import Round
from dit_scale.ledger import Heading

SECOND = 2**30
"""Ticks."""


class FailureKind(StrEnum):
    """What happens to a node."""

    CRASH = "crash"
    """A rank dies; its node stays."""
    HANG = "hang"
    """A rank stands still; its node stays."""
    STOP = "stop"
    """A rank is stopped by a signal, which its supervisor sees."""
    DEATH = "death"
    """A supervisor is killed and its ranks with it, so that those of other nodes break off. It is started
    again after the repair time."""
    LOSS = "loss"
    """The node is gone, with its supervisor, without a sign to anybody, and comes back repaired."""


@dataclass(frozen=True)
class Costs:
    """Seconds that things take."""

    step_s: float = 1.0
    save_stall_s: float = 0.5
    """The loop stands still at the begin of a save."""
    commit_lag_s: float = 10.0
    """From the begin of a save to its commit; what is done meanwhile is not yet safe."""
    launch_s: float = 20.0
    """Old ranks ended, launcher and imports."""
    init_s: float = 20.0
    """Process groups and engine."""
    restore_s: float = 10.0
    first_step_s: float = 10.0
    """What the first step takes longer than others."""
    break_s: float = 1.0
    """Until ranks whose peer was killed have ended."""


@dataclass
class Halt:
    """The ranks do not get on any more."""

    at: int
    node: str
    kind: FailureKind


@dataclass
class Job:
    """The ranks of all members of one round; times in ticks."""

    costs: Costs
    """In a world of these members."""
    full_step_s: float
    """What a step takes in the full world."""
    every_steps: int
    total_steps: int
    round: Round
    sealed_at: int
    halt: Halt | None = None
    ended_at: int | None = None
    trains_at: int | None = None
    """When the first step begins; None until all members have started."""
    running: set[str] = field(default_factory=set)
    """Members whose ranks are there."""
    _waits_for: int = field(init=False)
    """Members whose ranks have not started."""
    _restore_at: int = 0
    _leave: tuple[int, int] | None = None
    """Ticks of training after which asked ranks leave, and the steps that they have taken then."""

    def __post_init__(self) -> None:
        self._waits_for = len(self.round.members)
        self.begin_step = max(0, self.round.committed_step)
        self.step = ticks(self.costs.step_s)
        self.unit = min(ticks(self.full_step_s), self.step)
        self._lag = ticks(self.costs.commit_lag_s)
        # One save at a time: the next one waits for the commit of the last.
        self._stall = max(ticks(self.costs.save_stall_s), self._lag - self.every_steps * self.step)
        self._last_wait = max(self._stall, self._lag)
        self._left = self.total_steps - self.begin_step
        self._first = min(self.every_steps - self.begin_step % self.every_steps, self._left)
        self._saves = _up(self._left - self._first, self.every_steps)
        """Before that of the last step."""
        self._cycle = self._stall + self.every_steps * self.step

    def start(self, node: str, now: int) -> None:
        """A member starts its ranks; with the last one all begin."""
        self.running.add(node)
        self._waits_for -= 1
        if self._waits_for == 0:
            costs = self.costs
            restore_s = costs.restore_s if self.round.committed_step >= 0 else 0.0
            self._restore_at = now + ticks(costs.launch_s + costs.init_s)
            self.trains_at = self._restore_at + ticks(restore_s) + ticks(costs.first_step_s)

    def is_restoring(self, now: int) -> bool:
        """Whether the ranks read a checkpoint."""
        first = ticks(self.costs.first_step_s)
        return self.trains_at is not None and self._restore_at <= now < self.trains_at - first

    def broken_at(self) -> int | None:
        """When the ranks of other nodes have ended, since those of one were killed; None: they wait for it.

        Before there are process groups nobody notices.
        """
        halt = self.halt
        if (
            halt is None
            or halt.kind != FailureKind.DEATH
            or self.trains_at is None
            or halt.at < self._restore_at
        ):
            return None
        return halt.at + ticks(self.costs.break_s)

    def ask(self, now: int) -> None:
        """The ranks are to finish their step, save and leave; the first request counts."""
        if self._leave is None:
            compute, stall = self._progress(now)
            steps = min(_up(compute, self.step), self._left)
            saves = _up(stall, self._stall) if self._stall else 0
            self._leave = (
                steps * self.step + min(saves, self._saves) * self._stall + self._last_wait,
                steps,
            )

    @property
    def is_asked(self) -> bool:
        return self._leave is not None

    @property
    def over_at(self) -> int | None:
        """When the ranks leave by themselves; None while that is not known."""
        if self.trains_at is None:
            return None
        return self.trains_at + (self._leave[0] if self._leave else self._whole())

    def is_done(self) -> bool:
        """Whether the ranks, if they left, did so behind the last step."""
        return self._leave is None or self._leave[1] == self._left

    def steps(self, now: int) -> int:
        """Whole steps taken in this round."""
        return self._progress(now)[0] // self.step

    def committed(self, now: int) -> int:
        """The newest committed step, -1 when there is none."""
        if self.halt is not None:
            now = min(now, self.halt.at)
        kept = self._kept(now)
        return self.begin_step + kept if kept else self.round.committed_step

    def next_commit(self, now: int) -> int | None:
        """When the next save will be committed, if nothing happens."""
        if self.trains_at is None or self.halt is not None:
            return None
        done = self._commits(now - self.trains_at)
        at = self._first * self.step + done * self._cycle + self._lag if done < self._saves else self._whole()
        return self.trains_at + at

    def account(self, next_at: int) -> dict[Heading, int]:
        """Where the time from its sealing to that of the next round went."""
        ended_at = next_at if self.ended_at is None else self.ended_at
        left_at = ended_at if self.over_at is None else self.over_at
        stop = min(next_at, left_at if self.halt is None else self.halt.at)
        trains_at = stop if self.trains_at is None else min(self.trains_at, stop)
        restoring = 0
        if self.trains_at is not None:
            restored = self.trains_at - ticks(self.costs.first_step_s)
            restoring = max(0, min(restored, stop) - self._restore_at)
        compute, stall = self._progress(stop)
        kept = self._kept(stop)
        noticed = max(stop, ended_at) if self.halt is not None else stop
        return {
            Heading.RESTART: trains_at - self.sealed_at - restoring,
            Heading.RESTORE: restoring,
            Heading.PRODUCTIVE: kept * self.unit,
            Heading.DEGRADED: kept * (self.step - self.unit),
            Heading.REPLAYED: compute - kept * self.step,
            Heading.CHECKPOINT: stall,
            Heading.DETECT: noticed - stop,
            Heading.WAITING: next_at - noticed,
        }

    def _progress(self, now: int) -> tuple[int, int]:
        """Ticks of training so far, spent in steps and in stalls."""
        elapsed = max(0, now - self.trains_at) if self.trains_at is not None else 0
        saves = self._saves
        compute = self._left * self.step
        if elapsed < self._first * self.step:
            compute = elapsed
        elif elapsed < compute + saves * self._stall:
            cycles, rest = divmod(elapsed - self._first * self.step, self._cycle)
            compute = elapsed - cycles * self._stall - min(rest, self._stall)
        if self._leave is not None:
            compute = min(compute, self._leave[1] * self.step)
        return compute, elapsed - compute

    def _commits(self, elapsed: int) -> int:
        """Saves committed, without that of the last step."""
        since_first = elapsed - self._lag - self._first * self.step
        return min(since_first // self._cycle + 1, self._saves) if since_first >= 0 else 0

    def _kept(self, now: int) -> int:
        """Steps of this round that are committed."""
        if self.trains_at is None or now < self.trains_at:
            return 0
        elapsed = now - self.trains_at
        if self._leave is not None and elapsed >= self._leave[0]:
            return self._leave[1]
        if elapsed >= self._whole():
            return self._left
        saved = self._commits(elapsed)
        return self._first + (saved - 1) * self.every_steps if saved else 0

    def _whole(self) -> int:
        """Ticks of training to the commit of the last step."""
        return self._left * self.step + self._saves * self._stall + (self._last_wait if self._left else 0)


def ticks(seconds: float) -> int:
    """Of a time in seconds, rounded."""
    return round(seconds * SECOND)


def _up(a: int, b: int) -> int:
    """Of a / b, the next whole number."""
    return -(-a // b)
