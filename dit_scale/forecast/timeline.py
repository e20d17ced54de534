"""The ranks of a simulated round in closed form: their progress at any time, and where the time went.

Time is counted in whole ticks of 2^-30 s: sums are exact, and ticks convert to seconds without rounding.
"""

from dataclasses import dataclass
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
    """A rank hangs; its node stays."""
    STOP = "stop"
    """A rank is stopped by a signal, which its supervisor can see."""
    DEATH = "death"
    """A supervisor is killed together with its ranks, so the ranks of other nodes fail. It is restarted after
    the repair time."""
    LOSS = "loss"
    """The node disappears together with its supervisor, and returns after the repair time."""


@dataclass(frozen=True)
class Costs:
    """Durations in seconds."""

    step_s: float = 1.0
    save_stall_s: float = 0.5
    """Pause of training at the start of a save."""
    commit_lag_s: float = 10.0
    """From the start of a save to its commit. Steps taken meanwhile are not safe yet."""
    launch_s: float = 20.0
    """Stopping old ranks, launcher and imports."""
    init_s: float = 20.0
    """Process groups and engine."""
    restore_s: float = 10.0
    first_step_s: float = 10.0
    """Extra time of the first step."""
    break_s: float = 1.0
    """From the death of a peer to the exit of the other ranks."""


@dataclass(frozen=True)
class Halt:
    """The ranks of a round have stopped making progress."""

    at: int
    node: str
    kind: FailureKind


@dataclass(frozen=True)
class Stop:
    """Ranks that were asked to stop exit with a save."""

    elapsed: int
    """Ticks of training until then."""
    steps: int
    """Steps of this round taken by then."""


class SaveSchedule:
    """Training from one step to the last one without failures; times in ticks since it started.

    One save at a time: a save that takes longer than the interval delays the next one until its commit. The
    ranks wait for the commit of the last step.
    """

    def __init__(
        self, costs: Costs, *, full_step_s: float, every_steps: int, begin_step: int, total_steps: int
    ) -> None:
        """`full_step_s` is the duration of a step with all nodes."""
        self.step = ticks(costs.step_s)
        self.full_step = min(ticks(full_step_s), self.step)
        self.steps = total_steps - begin_step
        self._lag = ticks(costs.commit_lag_s)
        self._every_steps = every_steps
        self._stall = max(ticks(costs.save_stall_s), self._lag - every_steps * self.step)
        self._first = min(every_steps - begin_step % every_steps, self.steps)
        """Steps up to the first save."""
        self._saves = _ceil_div(self.steps - self._first, every_steps)
        """Saves before that of the last step."""
        self._cycle = self._stall + every_steps * self.step
        """From one save to the next."""

    @property
    def duration(self) -> int:
        """Time to the commit of the last step."""
        last_wait = self._last_wait if self.steps else 0
        return self.steps * self.step + self._saves * self._stall + last_wait

    def computed(self, elapsed: int) -> int:
        """Return the time spent on steps so far; the rest of `elapsed` are stalls."""
        compute = self.steps * self.step
        if elapsed < self._first * self.step:
            return elapsed
        if elapsed < compute + self._saves * self._stall:
            cycles, rest = divmod(elapsed - self._first * self.step, self._cycle)
            return elapsed - cycles * self._stall - min(rest, self._stall)
        return compute

    def committed(self, elapsed: int) -> int:
        """Return the steps committed so far."""
        if elapsed >= self.duration:
            return self.steps
        commits = self._commits(elapsed)
        return self._first + (commits - 1) * self._every_steps if commits else 0

    def next_commit(self, elapsed: int) -> int:
        """Return when the next save will be committed."""
        commits = self._commits(elapsed)
        if commits == self._saves:
            return self.duration
        return self._first * self.step + commits * self._cycle + self._lag

    def stop(self, elapsed: int) -> Stop:
        """Return when ranks exit that are asked to stop now: they finish step and pending saves, and save."""
        compute = self.computed(elapsed)
        steps = min(_ceil_div(compute, self.step), self.steps)
        saves = _ceil_div(elapsed - compute, self._stall) if self._stall else 0
        return Stop(steps * self.step + min(saves, self._saves) * self._stall + self._last_wait, steps)

    @property
    def _last_wait(self) -> int:
        return max(self._stall, self._lag)

    def _commits(self, elapsed: int) -> int:
        """Return the number of committed saves, without that of the last step."""
        since_first = elapsed - self._lag - self._first * self.step
        return min(since_first // self._cycle + 1, self._saves) if since_first >= 0 else 0


class Job:
    """The ranks of all members of one round; times in ticks."""

    def __init__(self, costs: Costs, schedule: SaveSchedule, round_: Round, sealed_at: int) -> None:
        """`costs` and `schedule` are those of this number of members."""
        self.costs, self.schedule, self.round, self.sealed_at = costs, schedule, round_, sealed_at
        self.halt: Halt | None = None
        self.ended_at: int | None = None
        self.trains_at: int | None = None
        """When the first step starts; None until all members have started their ranks."""
        self.running: set[str] = set()
        """Members whose ranks have been started and not stopped."""
        self._num_missing = len(round_.members)
        """Members that have not started their ranks."""
        self._restore_at = 0
        self._stop: Stop | None = None

    def start(self, node: str, now: int) -> None:
        """Start the ranks of a member; they make progress once all members have started theirs."""
        self.running.add(node)
        self._num_missing -= 1
        if self._num_missing == 0:
            costs = self.costs
            restore_s = costs.restore_s if self.round.committed_step >= 0 else 0.0
            self._restore_at = now + ticks(costs.launch_s + costs.init_s)
            self.trains_at = self._restore_at + ticks(restore_s) + ticks(costs.first_step_s)

    def is_restoring(self, now: int) -> bool:
        """Whether the ranks are reading a checkpoint."""
        first_step = ticks(self.costs.first_step_s)
        return self.trains_at is not None and self._restore_at <= now < self.trains_at - first_step

    def broken_at(self) -> int | None:
        """Return when the other ranks exit because a peer was killed; None if they wait for it instead.

        Before there are process groups, ranks do not notice.
        """
        halt = self.halt
        if halt is None or halt.kind != FailureKind.DEATH:
            return None
        if self.trains_at is None or halt.at < self._restore_at:
            return None
        return halt.at + ticks(self.costs.break_s)

    def ask_to_stop(self, now: int) -> None:
        """Ask the ranks to finish their step, save and exit; only the first request counts."""
        if self._stop is None:
            self._stop = self.schedule.stop(self._elapsed(now))

    @property
    def is_asked(self) -> bool:
        """Whether the ranks were asked to save and exit."""
        return self._stop is not None

    @property
    def over_at(self) -> int | None:
        """When the ranks exit on their own; None while that is unknown."""
        if self.trains_at is None:
            return None
        return self.trains_at + (self._stop.elapsed if self._stop else self.schedule.duration)

    @property
    def is_done(self) -> bool:
        """Whether the ranks exit after the last step."""
        return self._stop is None or self._stop.steps == self.schedule.steps

    def steps(self, now: int) -> int:
        """Return the number of complete steps of this round."""
        return self._computed(now) // self.schedule.step

    def committed(self, now: int) -> int:
        """Return the newest committed step, or -1."""
        if self.halt is not None:
            now = min(now, self.halt.at)
        kept = self._kept(now)
        return max(0, self.round.committed_step) + kept if kept else self.round.committed_step

    def next_commit(self, now: int) -> int | None:
        """Return when the next save will be committed unless a rank fails; None if none is expected."""
        if self.trains_at is None or self.halt is not None:
            return None
        return self.trains_at + self.schedule.next_commit(now - self.trains_at)

    def account(self, next_at: int) -> dict[Heading, int]:
        """Return where the time from the sealing of this round to that of the next one went."""
        ended_at = next_at if self.ended_at is None else self.ended_at
        exited_at = ended_at if self.over_at is None else self.over_at
        stop = min(next_at, exited_at if self.halt is None else self.halt.at)
        trains_at = stop if self.trains_at is None else min(self.trains_at, stop)
        restoring = 0
        if self.trains_at is not None:
            restored = self.trains_at - ticks(self.costs.first_step_s)
            restoring = max(0, min(restored, stop) - self._restore_at)
        compute = self._computed(stop)
        kept, step, full_step = self._kept(stop), self.schedule.step, self.schedule.full_step
        detected = max(stop, ended_at) if self.halt is not None else stop
        return {
            Heading.RESTART: trains_at - self.sealed_at - restoring,
            Heading.RESTORE: restoring,
            Heading.PRODUCTIVE: kept * full_step,
            Heading.DEGRADED: kept * (step - full_step),
            Heading.REPLAYED: compute - kept * step,
            Heading.CHECKPOINT: self._elapsed(stop) - compute,
            Heading.DETECT: detected - stop,
            Heading.WAITING: next_at - detected,
        }

    def _elapsed(self, now: int) -> int:
        """Return the time since the first step started."""
        return max(0, now - self.trains_at) if self.trains_at is not None else 0

    def _computed(self, now: int) -> int:
        """Return the time spent on steps so far."""
        compute = self.schedule.computed(self._elapsed(now))
        return compute if self._stop is None else min(compute, self._stop.steps * self.schedule.step)

    def _kept(self, now: int) -> int:
        """Return the number of committed steps of this round."""
        if self.trains_at is None or now < self.trains_at:
            return 0
        elapsed = self._elapsed(now)
        if self._stop is not None and elapsed >= self._stop.elapsed:
            return self._stop.steps
        return self.schedule.committed(elapsed)


def ticks(seconds: float) -> int:
    """Convert seconds to ticks, rounded."""
    return round(seconds * SECOND)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
