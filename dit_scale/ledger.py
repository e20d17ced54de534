"""Where wall-clock time went, by heading: one ledger for measured runs and simulated ones.

Times are whole units (microseconds of a journal, ticks of a simulation), so sums are exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Heading(StrEnum):
    """What a moment of wall-clock time was spent on. The values are names in JSON output."""

    STOPPED = "stopped"
    """No process was running, as far as the journals show. Measured runs only."""
    WAITING = "waiting"
    """Supervisors were waiting for nodes, or for stale processes to exit."""
    RESTART = "restart"
    """Stopping old ranks, then everything from the start of a round to its first step: launcher, imports,
    process groups, engine, compilation."""
    STARTUP = "startup"
    """The same for the first start of a run, until its first step or its failure. Measured runs only."""
    REPLAYED = "replayed"
    """Lost steps: a later attempt took them again, or will have to."""
    PRODUCTIVE = "productive"
    """Steps that count. In a simulation, at the speed of all nodes."""
    DEGRADED = "degraded"
    """Extra time that productive steps took because nodes were missing. Simulated runs only."""
    DATA = "data"
    """Rank 0 waited for a batch. Measured runs only."""
    CHECKPOINT = "checkpoint"
    """Training paused for a save: the copy to host memory, or the wait for the previous commit."""
    EVALUATION = "evaluation"
    """The weights were evaluated between two steps. Measured runs only."""
    RESTORE = "restore"
    """Finding a checkpoint and reading it."""
    DETECT = "detect"
    """From a failure, or the last heartbeat before it, to the end of the round."""


@dataclass(frozen=True)
class Ledger:
    """The wall-clock time of a run from `begin` to `end`, by heading, in whole units."""

    begin: int
    end: int
    spent: Mapping[Heading, int]
    """Units by heading; a heading that this kind of run cannot observe is absent. They sum to `wall`."""
    units_per_s: int

    @property
    def wall(self) -> int:
        """Units of wall-clock time."""
        return self.end - self.begin

    @property
    def wall_s(self) -> float:
        """Seconds of wall-clock time."""
        return self.wall / self.units_per_s

    @property
    def goodput(self) -> float:
        """Productive share of the wall-clock time, 0 to 1."""
        return self.spent[Heading.PRODUCTIVE] / self.wall if self.wall else 0.0

    def seconds(self, *headings: Heading) -> float:
        """Return the seconds spent on these headings together; an absent heading counts as 0."""
        return sum(self.spent.get(heading, 0) for heading in headings) / self.units_per_s

    def by_name(self) -> dict[str, float]:
        """Return the seconds by name of the heading, for JSON."""
        return {heading.value: self.seconds(heading) for heading in self.spent}
