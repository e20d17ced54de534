"""When a rank has stopped: deadlines by section, from the beats alone.

A rank that waits for others is not to blame, and the deadline that counts is that of the one they wait for:
so a node that finds nothing but old beats says so, and `culprit` judges over the ranks of all nodes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dit_scale.elastic.node.exits import Verdict
from dit_scale.heartbeat import Beat, Phase, place

SHORTEST_S = 10.0
"""No step is given less time before it counts as stopped."""
TIMES_P99 = 3.0
"""A step may take this many times the 99th percentile of the steps before."""
NOTICE_S = 2.0
"""Of that time, what it takes to look and to hear the other nodes."""
LEAVE_S = 10.0
"""Time that a rank which has given up has to say why."""


@dataclass(frozen=True)
class Deadlines:
    """Seconds that a beat of a section may be the last one."""

    start_s: float = 900.0
    """Imports, process group, engine, and the first steps, which may compile."""
    restore_s: float = 600.0
    """One tensor, or finding the newest checkpoint: a storage gives a request up long before."""
    restored_s: float = 3600.0
    """Until the slowest rank has read its part."""
    save_s: float = 120.0
    """Between two votes on a commit: a copy of the state, a pause of at most a minute before another try."""
    data_s: float = 300.0 + LEAVE_S
    """Longer than the loader waits before it gives up by itself, and says what it waited for."""
    shortest_s: float = SHORTEST_S

    def quiet(self, beat: Beat) -> float:
        """How long a beat may be the last one before it is worth a look at all ranks."""
        return max(self.shortest_s, TIMES_P99 * beat.p99_s) - NOTICE_S

    def of(self, beat: Beat) -> float:
        """How long this beat may be the last one."""
        match beat.section:
            case Phase.START:
                return self.start_s
            case Phase.RESTORE:
                return self.restore_s
            case Phase.RESTORED:
                return self.restored_s
            case Phase.WAIT_SAVE:
                return self.save_s
        if beat.p99_s == 0:
            return self.start_s
        return max(self.quiet(beat), self.data_s) if beat.section == Phase.DATA else self.quiet(beat)


@dataclass(frozen=True)
class Standing:
    """Where a rank stands, and for how long."""

    rank: int
    pid: int
    """0 before its first beat."""
    section: Phase
    step: int
    """Steps taken."""
    age_s: float
    """Since its last beat."""
    limit_s: float
    """How old that may become."""
    quiet_s: float = 0.0
    """From which age on it is worth a look at all ranks."""
    stopped: bool = False
    """Whether the kernel says that the process stands still, and not that it waits."""
    waits: bool = False
    """Whether it was seen inside a collective."""

    @property
    def is_overdue(self) -> bool:
        return self.age_s > self.limit_s

    def __str__(self) -> str:
        waits = "waits for other ranks" if self.waits else "does not get on"
        state = "is stopped" if self.stopped else waits
        return (
            f"rank {self.rank} (process {self.pid}) {state} {place(self.section, self.step)}, "
            f"{self.age_s:.1f} s without a beat"
        )


def standings(
    beats: Mapping[int, Beat | None],
    verdicts: Mapping[int, Verdict | None],
    deadlines: Deadlines,
    now_s: float,
    began_s: float,
) -> list[Standing]:
    """Of the ranks that have not ended; of one that never said a word since the group began, too.

    `began_s` may also be a later time up to which nobody could look: no beat counts as older than that.
    """
    found = []
    for rank, beat in beats.items():
        if verdicts[rank] is not None:
            continue
        beat = beat or Beat(0, Phase.START, 0, began_s)
        stopped = beat.pid != 0 and is_stopped(beat.pid)
        quiet_s = deadlines.quiet(beat)
        limit_s = quiet_s if stopped else deadlines.of(beat)
        age_s = now_s - max(beat.at_s, began_s)
        found.append(Standing(rank, beat.pid, beat.section, beat.step, age_s, limit_s, quiet_s, stopped))
    return found


def culprit(found: Iterable[Standing]) -> Standing:
    """Of ranks that all stand still, the one that the others wait for.

    A stopped process first. Else the one that is least far: the others came as far as they could without
    it. In the same step and section it is who was not seen inside a collective, or has been there longest.
    """
    return min(found, key=lambda one: (not one.stopped, one.step, one.section, one.waits, -one.age_s))


def is_stopped(pid: int) -> bool:
    """Whether a process got SIGSTOP. One that a debugger looks at, in the state t, did not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
