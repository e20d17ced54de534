"""When a rank has stopped: deadlines by section, from the beats alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dit_scale.elastic.exits import Verdict
from dit_scale.elastic.heartbeat import Beat, Section

SHORTEST_S = 10.0
"""No deadline of a step is shorter."""
TIMES_P99 = 3.0
"""A step may take this many times the 99th percentile of the steps before."""


@dataclass(frozen=True)
class Deadlines:
    """Seconds that a rank may stay in one section."""

    start_s: float = 900.0
    """Imports, process group, engine, and the first steps, which may compile."""
    restore_s: float = 3600.0
    save_s: float = 3600.0
    """Of the wait for a commit."""
    data_s: float = 300.0
    """The loader gives up by itself before that."""
    shortest_s: float = SHORTEST_S

    def of(self, beat: Beat) -> float:
        """How long this beat may be the last one."""
        match beat.section:
            case Section.START:
                return self.start_s
            case Section.RESTORE:
                return self.restore_s
            case Section.WAIT_SAVE:
                return self.save_s
        if beat.p99_s == 0:
            return self.start_s
        step_s = max(self.shortest_s, TIMES_P99 * beat.p99_s)
        return max(step_s, self.data_s) if beat.section == Section.DATA else step_s


@dataclass(frozen=True)
class Stall:
    """A rank that does not get on."""

    rank: int
    pid: int
    section: Section
    step: int
    age_s: float
    """Since its last beat."""
    stopped: bool
    """Whether the kernel says that the process stands still, and not that it waits."""

    def __str__(self) -> str:
        state = "is stopped" if self.stopped else "does not get on"
        return (
            f"rank {self.rank} (process {self.pid}) {state} in {self.section.name} of step {self.step}, "
            f"{self.age_s:.1f} s without a beat"
        )


def find_stall(
    beats: Mapping[int, Beat | None],
    verdicts: Mapping[int, Verdict | None],
    deadlines: Deadlines,
    now_s: float,
) -> Stall | None:
    """The rank that holds the others up, when one is over its deadline; None when all get on."""
    running = {rank: beat for rank, beat in beats.items() if beat is not None and verdicts[rank] is None}
    if not any(now_s - beat.at_s > deadlines.of(beat) for beat in running.values()):
        return None
    stalls = [
        Stall(rank, beat.pid, beat.section, beat.step, now_s - beat.at_s, is_stopped(beat.pid))
        for rank, beat in running.items()
    ]
    return culprit(stalls)


def culprit(stalls: list[Stall]) -> Stall:
    """Of ranks that all stand still, the one that the others wait for.

    A stopped process first. Else the one that is least far: the others came as far as they could without
    it, so in the same step and section it is who has been there longest.
    """
    return min(stalls, key=lambda stall: (not stall.stopped, stall.step, stall.section, -stall.age_s))


def is_stopped(pid: int) -> bool:
    """Whether a process is in the state T: it got SIGSTOP, or a debugger has it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False
