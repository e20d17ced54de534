"""Supervisors without processes, for tests: over a real board, on a clock that is set on by hand."""

from collections.abc import Callable
from pathlib import Path

from dit_scale.elastic.board import Board, Member, Round
from dit_scale.elastic.node.group import GroupOutcome, Standing
from dit_scale.elastic.supervisor import Dependencies, Policy, Supervisor
from dit_scale.storage import open_storage

TWO = Policy(min_nodes=2, max_nodes=2)


class Ranks:
    """Of one node: they train until they are ended."""

    def __init__(self) -> None:
        self.round = 0
        self.outcome: GroupOutcome | None = None

    def start(self, round_: Round, index: int) -> None:
        self.round = round_.number

    def poll(self) -> GroupOutcome | None:
        return self.outcome

    def quiet(self) -> tuple[Standing, ...]:
        return ()

    def ask_to_stop(self) -> None:
        """They do not listen."""

    def keep_stacks(self) -> None:
        """They have none."""

    def stop(self) -> None:
        self.round, self.outcome = 0, None


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
        self.ranks, self.code = Ranks(), None
        self.is_wanted_back = False
        me = Member(name, f"{name} of start {start}", "", 1, 1, "digest", start)
        world = Dependencies(
            lambda: cluster.now_s,
            lambda: -1,
            lambda: self.is_wanted_back,
            lambda text: None,
            problems=problems,
        )
        self._life = Supervisor(me, cluster.board, self.ranks, policy, world).run()

    def look(self) -> None:
        try:
            next(self._life)
        except StopIteration as end:
            self.code = end.value


class Cluster:
    """Supervisors that look in turn, on a clock that is set on."""

    def __init__(self, folder: Path) -> None:
        self.board, self.now_s = Board(open_storage(folder)), 0.0

    def run(self, *nodes: Node, seconds: float = 1.0) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            for node in nodes:
                if node.code is None:
                    node.look()
            self.now_s += TWO.poll_s

    def members(self, number: int) -> list[tuple[str, int]]:
        round_ = self.board.sealed(number)
        return [(member.node, member.start) for member in round_.members] if round_ else []
