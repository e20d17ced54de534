"""How many nodes a run takes, and how long its supervisors wait for what."""

from dataclasses import dataclass

LOOKS_PER_S = 1024
"""Looks at the board per second, by all nodes together. Each takes two to five requests; a prefix on S3
answers 5,500 a second."""


@dataclass(frozen=True)
class Policy:
    """Numbers of nodes, and times in seconds."""

    min_nodes: int = 1
    max_nodes: int = 1
    poll_s: float = 0.25
    lease_s: float = 15.0
    """A node whose lease has not been renewed for this long is lost."""
    settle_s: float = 10.0
    """When no further node has joined for this long, a round starts with the nodes that have."""
    patience_s: float = 3.0
    """Time for the first node to start a round; after that any other node does."""
    gather_s: float = 3600.0
    """Longest wait for `min_nodes` to join."""
    save_s: float = 900.0
    """Longest wait for ranks that were asked to save and exit."""
    grow_s: float = 60.0
    """Shortest duration of a round that waiting nodes interrupt; it also needs a new commit."""
    max_fruitless: int = 3
    """Consecutive failures without a newer checkpoint after which the run gives up."""

    @property
    def look_s(self) -> float:
        """Time between two looks at the board.

        It grows with the number of nodes, so that all together stay below LOOKS_PER_S as far as the renewal
        of leases permits.
        """
        return max(self.poll_s, min(self.max_nodes / LOOKS_PER_S, self.lease_s / 5))
