"""What all stages of a supervisor share: its entry on the board, its lease, and the outside world."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dit_scale.elastic.board import Board, Ending, Member, Reason, Round
from dit_scale.elastic.lease import Lease
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.node.group import Group
from dit_scale.elastic.policy import Policy
from dit_scale.journal import Event
from dit_scale.lines import Say


@dataclass(kw_only=True)
class Dependencies:
    """What a supervisor needs of the world. A simulation passes its own."""

    clock: Callable[[], float]
    """Monotonic seconds."""
    committed_step: Callable[[], int]
    """Step of the newest checkpoint; -1 when there is none."""
    is_wanted_back: Callable[[], bool]
    """Whether the scheduler has asked for this node."""
    start_group: Callable[[Round, int], Group]
    """Starts the ranks of a member of a round, by its index."""
    say: Say
    """Prints a line on the log."""
    record: Callable[..., None] = field(default=lambda event, **details: None)
    """Writes an event to the journal of this supervisor."""
    free_port: Callable[[], int] = field(default=lambda: 29500)
    """Returns a port of this node on which nothing listens; called before every round."""
    samples_of: Callable[[int], list[int]] = field(default=lambda step: [])
    """Returns the sample ids of the step that follows this number of steps."""
    problems: Callable[[], list[str]] = field(default=list)
    """Returns what makes this node unfit; called at the start and before every further round."""


class LocalNode:
    """The node of this supervisor."""

    def __init__(self, member: Member, board: Board, policy: Policy, dependencies: Dependencies) -> None:
        self.member, self.board, self.policy = member, board, policy
        self.dependencies = dependencies
        self.lease = Lease(board, member.node, policy.lease_s)

    @property
    def name(self) -> str:
        """Name of the node."""
        return self.member.node

    @property
    def start(self) -> int:
        """Number of this start of the job."""
        return self.member.start

    def adopt_start(self, start: int) -> None:
        """Continue a start of the job that others have numbered."""
        self.member = replace(self.member, start=start)

    def join(self, number: int) -> None:
        """Ask to become a member of a round, with a port that is free now."""
        self.member = replace(self.member, port=self.dependencies.free_port())
        self.board.join(number, self.member)
        self.dependencies.record(Event.JOINED, round=number)

    def withdraw(self, number: int) -> None:
        """Stay out of a round, so that no other node waits for this one."""
        self.board.withdraw(number, self.member)

    def give_back(self, number: int) -> Exit:
        """Exit because the scheduler wants the node back; `number` is the next round."""
        self.withdraw(number)
        return Exit.REQUEUE

    def make_way(self) -> Exit:
        """Exit because a later start of the job has superseded this one."""
        self.dependencies.say("superseded by a later start of this job, or by another job of the same run")
        self.dependencies.record(Event.MADE_WAY, start=self.start)
        return Exit.DO_NOT_RESTART

    def end_round(
        self,
        number: int,
        reason: Reason,
        text: str,
        *,
        node: str = "",
        details: dict[str, Any] | None = None,
    ) -> None:
        """Record why a round ended, unless a reason is recorded already; `node` is this one by default."""
        committed_step = self.dependencies.committed_step()
        self.board.end(
            Ending(
                round=number,
                reason=reason,
                node=node or self.name,
                text=text,
                committed_step=committed_step,
                details=details or {},
            )
        )

    def next_look(self) -> float:
        """Renew the lease if it is due, and return the time of the next look at the board."""
        now_s = self.dependencies.clock()
        self.lease.renew(now_s)
        return now_s + self.policy.look_s
