"""Leases: counters that living supervisors move on. Members of a round watch each other, in a ring."""

from dit_scale.elastic.board import Board, Round
from dit_scale.storage import DiskFullError


class Leases:
    """The lease of one node, and its watch over another's; times are of its own monotonic clock."""

    def __init__(self, board: Board, node: str, lease_s: float) -> None:
        """A counter that stands still for longer than `lease_s` means that a node is lost."""
        self._board, self._node, self._lease_s = board, node, lease_s
        self._count, self._renewed_s = 0, float("-inf")
        self._neighbour, self._seen, self._since_s = node, -1, 0.0

    def renew(self, now_s: float) -> None:
        """Move on the counter of this node when it is time.

        While the disk is full nobody can: this node goes on, and gives its neighbour time from then on.
        """
        if now_s - self._renewed_s > self._lease_s / 5:
            self._count += 1
            self._renewed_s = now_s
            try:
                self._board.renew_lease(self._node, self._count)
            except DiskFullError:
                self._since_s = now_s

    def watch(self, round_: Round, index: int, now_s: float) -> None:
        """Watch the member before member `index`, which is this node: each is watched by one."""
        self._neighbour, self._seen, self._since_s = round_.members[index - 1].node, -1, now_s

    def lost(self, now_s: float) -> str | None:
        """The name of the watched node when its counter has stood still for too long."""
        if self._neighbour == self._node:
            return None
        count = self._board.lease(self._neighbour)
        if count != self._seen:
            self._seen, self._since_s = count, now_s
        return self._neighbour if now_s - self._since_s > self._lease_s else None


class Outside:
    """A watch, from outside a round, over whether any of its members lives; it reads few leases."""

    def __init__(self, board: Board, round_: Round, lease_s: float) -> None:
        self._board, self._nodes, self._lease_s = board, list(round_.places), lease_s
        self.watched, self._since_s = self._nodes[0], 0.0
        self._seen: int | None = None
        self._counts: dict[str, int] | None = None
        """Of all members, since the one that is watched stands still."""

    def is_deserted(self, now_s: float) -> bool:
        """Whether the leases of all members have stood still for so long."""
        self._see(self.watched, self._board.lease(self.watched), now_s)
        if now_s - self._since_s <= self._lease_s:
            return False
        if self._counts is None:
            self._counts = {node: self._board.lease(node) for node in self._nodes}
            self._since_s = now_s
            return False
        for node, count in self._counts.items():
            if (moved := self._board.lease(node)) != count:
                self._see(node, moved, now_s)
                return False
        return True

    def _see(self, node: str, count: int, now_s: float) -> None:
        if (node, count) != (self.watched, self._seen):
            self.watched, self._seen, self._since_s, self._counts = node, count, now_s, None
