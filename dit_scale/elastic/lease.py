"""Leases: counters that running supervisors increment. The members of a round watch each other in a ring.

All times are by the monotonic clock of the node that watches.
"""

from dit_scale.elastic.board import Board, Round
from dit_scale.storage import DiskFullError


class Lease:
    """The lease of this node."""

    def __init__(self, board: Board, node: str, lease_s: float) -> None:
        self.node, self.lease_s = node, lease_s
        self.blocked_s = float("-inf")
        """When the disk was last too full to renew it."""
        self._board = board
        self._count, self._renewed_s = 0, float("-inf")

    def renew(self, now_s: float) -> None:
        """Increment the counter if it is due, five times per `lease_s`.

        While the disk is full no node can do so, so this one continues without.
        """
        if now_s - self._renewed_s > self.lease_s / 5:
            self._count += 1
            self._renewed_s = now_s
            try:
                self._board.renew_lease(self.node, self._count)
            except DiskFullError:
                self.blocked_s = now_s


class NeighbourWatch:
    """One member's watch over the lease of the member before it, during one round."""

    def __init__(self, board: Board, lease: Lease, round_: Round, index: int, now_s: float) -> None:
        """`lease` is that of the watching node, member `index`."""
        self._board, self._lease = board, lease
        self._neighbour = round_.members[index - 1].node
        self._seen, self._since_s = -1, now_s

    def lost(self, now_s: float) -> str | None:
        """Return the name of the neighbour if it has not renewed its lease for too long.

        While the disk was too full for this node's lease it was for the neighbour's, so that time does not
        count.
        """
        if self._neighbour == self._lease.node:
            return None
        count = self._board.lease(self._neighbour)
        if count != self._seen:
            self._seen, self._since_s = count, now_s
        unchanged_s = now_s - max(self._since_s, self._lease.blocked_s)
        return self._neighbour if unchanged_s > self._lease.lease_s else None


class DesertionWatch:
    """A watch from outside over whether any member of a round is running. It reads few leases."""

    def __init__(self, board: Board, round_: Round, lease_s: float) -> None:
        self._board, self._nodes, self._lease_s = board, list(round_.places), lease_s
        self.watched, self._since_s = self._nodes[0], 0.0
        self._seen: int | None = None
        self._counts: dict[str, int] | None = None
        """Leases of all members, since the watched one stopped being renewed."""

    def is_deserted(self, now_s: float) -> bool:
        """Whether no member has renewed its lease for too long."""
        self._see(self.watched, self._board.lease(self.watched), now_s)
        if now_s - self._since_s <= self._lease_s:
            return False
        if self._counts is None:
            self._counts = {node: self._board.lease(node) for node in self._nodes}
            self._since_s = now_s
            return False
        for node, count in self._counts.items():
            if (renewed := self._board.lease(node)) != count:
                self._see(node, renewed, now_s)
                return False
        return True

    def _see(self, node: str, count: int, now_s: float) -> None:
        if (node, count) != (self.watched, self._seen):
            self.watched, self._seen, self._since_s, self._counts = node, count, now_s, None
