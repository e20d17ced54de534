"""Supervisors without processes, for tests: over a real board, on a clock that the test sets."""

from collections.abc import Callable
from pathlib import Path

from dit_scale.elastic.board import Board
from dit_scale.elastic.local_node import Dependencies
from dit_scale.elastic.node.deadlines import Standing
from dit_scale.elastic.node.outcomes import GroupOutcome
from dit_scale.elastic.policy import Policy
from dit_scale.elastic.supervisor import Supervisor
from dit_scale.storage import open_storage
from tests.support.nodes.members import member_of

TWO = Policy(min_nodes=2, max_nodes=2)


class Ranks:
    """The ranks of one node in one round. They train until they are killed, or until the test ends them."""

    def __init__(self, node: "Node", number: int) -> None:
        self._node = node
        node.round, node.outcome = number, None

    def poll(self) -> GroupOutcome | None:
        return self._node.outcome

    def quiet(self) -> tuple[Standing, ...]:
        return ()

    def ask_to_stop(self) -> None:
        """They ignore it."""

    def keep_stacks(self) -> None:
        """They have none."""

    def stop(self) -> None:
        self._node.round, self._node.outcome = 0, None


class Node:
    """A supervisor with its ranks."""

    def __init__(
        self,
        cluster: "Cluster",
        name: str,
        start: int = 0,
        policy: Policy = TWO,
        problems: Callable[[], list[str]] = list,
    ) -> None:
        self.round = 0
        """The round in which its ranks are running; 0 when there are none."""
        self.outcome: GroupOutcome | None = None
        """How its ranks ended."""
        self.code: int | None = None
        self.is_wanted_back = False
        dependencies = Dependencies(
            clock=lambda: cluster.now_s,
            committed_step=lambda: -1,
            is_wanted_back=lambda: self.is_wanted_back,
            start_group=lambda round_, index: Ranks(self, round_.number),
            say=lambda text: None,
            problems=problems,
        )
        member = member_of(name, boot=f"{name} of start {start}", start=start)
        self._supervision = Supervisor(member, cluster.board, policy, dependencies).run()

    def look(self) -> None:
        """Let the supervisor look around once."""
        try:
            next(self._supervision)
        except StopIteration as end:
            self.code = end.value


class Cluster:
    """Supervisors that look in turn, on one clock."""

    def __init__(self, folder: Path) -> None:
        self.board, self.now_s = Board(open_storage(folder)), 0.0

    def run(self, *nodes: Node, seconds: float = 1.0) -> None:
        """Let these nodes look until the time is up."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            for node in nodes:
                if node.code is None:
                    node.look()
            self.now_s += TWO.poll_s

    def members(self, number: int) -> list[tuple[str, int]]:
        """Name and start of the members of a round; empty while it is not sealed."""
        round_ = self.board.sealed(number)
        return [(member.node, member.start) for member in round_.members] if round_ else []
