"""When a rank counts as hung: a deadline for the age of its heartbeat in each phase.

A rank that waits for others is not the cause, and the deadline that counts is that of the rank they wait for.
So a node that sees nothing but old heartbeats reports them, and `culprit` judges over the ranks of all nodes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dit_scale.elastic.node.exits import Verdict
from dit_scale.heartbeat import Beat, Phase, where

SHORTEST_S = 10.0
"""Shortest time that a step gets before it counts as hung."""
TIMES_P99 = 3.0
"""A step may take this many times the 99th percentile of the steps before."""
NOTICE_S = 2.0
"""Share of that time reserved for noticing and for hearing the other nodes."""
LEAVE_S = 10.0
"""Time for a rank that has given up to report why."""


@dataclass(frozen=True)
class Deadlines:
    """Greatest age of the last heartbeat in each phase, in seconds."""

    start_s: float = 900.0
    """Imports, process group, engine, and the first steps, which may compile."""
    restore_s: float = 600.0
    """One tensor, or finding the newest checkpoint. A storage request gives up long before."""
    restored_s: float = 3600.0
    """Seconds until the slowest rank has read its part."""
    save_s: float = 120.0
    """Between two votes on a commit: a copy of the state, or a pause of at most a minute before a retry."""
    evaluate_s: float = 600.0
    """A denoising step or a tile, or the slowest rank's last one and a Frechet distance."""
    data_s: float = 300.0 + LEAVE_S
    """Longer than the loader waits before it gives up and reports what it waited for."""
    shortest_s: float = SHORTEST_S

    def quiet(self, beat: Beat) -> float:
        """Return the age of this heartbeat at which all ranks are examined."""
        return max(self.shortest_s, TIMES_P99 * beat.p99_s) - NOTICE_S

    def of(self, beat: Beat) -> float:
        """Return the age of this heartbeat beyond which its rank is overdue."""
        match beat.phase:
            case Phase.START:
                return self.start_s
            case Phase.RESTORE:
                return self.restore_s
            case Phase.RESTORED:
                return self.restored_s
            case Phase.WAIT_SAVE:
                return self.save_s
            case Phase.EVALUATE:
                return self.evaluate_s
        if beat.p99_s == 0:
            return self.start_s
        return max(self.quiet(beat), self.data_s) if beat.phase == Phase.DATA else self.quiet(beat)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a rank stands, and for how long."""

    rank: int
    pid: int
    """0 before its first heartbeat."""
    phase: Phase
    step: int
    """Steps taken."""
    age_s: float
    """Time since its last heartbeat."""
    limit_s: float
    """Age beyond which it is overdue."""
    quiet_s: float = 0.0
    """Age at which all ranks are examined."""
    stopped: bool = False
    """Whether its process was stopped by a signal."""
    waits: bool = False
    """Whether its stack is inside a collective."""

    @property
    def is_overdue(self) -> bool:
        """Whether its heartbeat is older than its deadline."""
        return self.age_s > self.limit_s

    def __str__(self) -> str:
        progress = "is waiting for other ranks" if self.waits else "makes no progress"
        state = "is stopped" if self.stopped else progress
        return (
            f"rank {self.rank} (process {self.pid}) {state} {where(self.phase, self.step)}, "
            f"last heartbeat {self.age_s:.1f} s ago"
        )


def standings_of(
    heartbeats: Mapping[int, Beat | None],
    verdicts: Mapping[int, Verdict | None],
    deadlines: Deadlines,
    *,
    now_s: float,
    since_s: float,
    is_stopped: Callable[[int], bool],
) -> list[Standing]:
    """Return where the ranks without a verdict stand, including those that have not sent a heartbeat yet.

    No age exceeds the time since `since_s`: when the ranks were started, or the end of a later time in which
    the supervisor could not look.
    """
    standings = []
    for rank, beat in heartbeats.items():
        if verdicts[rank] is not None:
            continue
        beat = beat or Beat(0, Phase.START, 0, since_s)
        stopped = beat.pid != 0 and is_stopped(beat.pid)
        quiet_s = deadlines.quiet(beat)
        standings.append(
            Standing(
                rank=rank,
                pid=beat.pid,
                phase=beat.phase,
                step=beat.step,
                age_s=now_s - max(beat.at_s, since_s),
                limit_s=quiet_s if stopped else deadlines.of(beat),
                quiet_s=quiet_s,
                stopped=stopped,
            )
        )
    return standings


def culprit(standings: Iterable[Standing]) -> Standing:
    """Return the rank that the others wait for, if all of them make no progress.

    A stopped process comes first, then the rank that has come least far: the others came as far as they could
    without it. Among ranks in the same phase of the same step, the culprit is not inside a collective. If all
    are, it is the rank with the oldest heartbeat.
    """
    return min(standings, key=lambda one: (not one.stopped, one.step, one.phase, one.waits, -one.age_s))
