"""Shared objects by which the supervisors of a run agree. They are in the run's storage: no host is special.

    elastic/join/<round>/<start>/<node>.json  a node asks to take part; <start> numbers the starts of the job
    elastic/join/<round>/<start>/<node>.left  a node has withdrawn: nobody waits for it
    elastic/sealed/<round>.json               the members; written conditionally, so there is one answer
    elastic/ended/<round>.json                why the round ended; likewise, the first reason counts
    elastic/reports/<round>/<node>.json       where the ranks of a node stand when they failed or hang
    elastic/leases/<node>.json                a counter that a running supervisor increments

A round is one period in which a fixed set of nodes trains. Clocks of different nodes are never compared.
"""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from dit_scale.errors import StorageError
from dit_scale.sealed import sealed, unseal_any
from dit_scale.storage import DiskFullError, MissingKeyError, Storage

_LEFT = ".left"
READERS = 16
"""Objects read in parallel. One by one, those of thousands of nodes would take a minute on S3."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A node that asks to take part in a round."""

    node: str
    boot: str
    """Random id of this start of its supervisor."""
    address: str
    port: int
    """A free port of the node, for the rendezvous of the ranks if the node is the first member."""
    slots: int
    """Ranks that the node runs."""
    config_sha256: str
    """Digest of its resolved configuration without paths."""
    start: int = 0
    """Number of this start of the job. A later start has a larger number and supersedes earlier ones."""


@dataclass(frozen=True)
class Joined:
    """The nodes that ask to take part in a round; only those of the newest start of the job."""

    start: int = 0
    nodes: list[str] = field(default_factory=list)
    """Names, sorted."""
    left: frozenset[str] = frozenset()
    """Nodes that have withdrawn since the round before."""


@dataclass(frozen=True)
class Round:
    """A sealed round."""

    number: int
    members: tuple[Member, ...]
    """In the order of their ranks."""
    committed_step: int
    """Step of the newest checkpoint when the round was sealed; -1 when there was none."""
    fruitless: int = 0
    """Consecutive failures before this round without a newer checkpoint."""

    @property
    def world(self) -> int:
        """World size."""
        return sum(member.slots for member in self.members)

    @property
    def start(self) -> int:
        """Number of the start of the job, the same for all members."""
        return self.members[0].start

    @cached_property
    def places(self) -> dict[str, int]:
        """Index of each member, by node, in their order."""
        return {member.node: place for place, member in enumerate(self.members)}

    def index_of(self, node: str) -> int | None:
        """Index of a node among the members; None if it is not one."""
        return self.places.get(node)


class Reason(StrEnum):
    """Why a round ended."""

    DONE = "done"
    FAILED = "failed"
    """A rank was killed, or exited with an error that may be transient."""
    HUNG = "hung"
    LOST = "lost"
    """A node has stopped renewing its lease."""
    LEAVING = "leaving"
    """A scheduler wants a node back."""
    GROWING = "growing"
    """More nodes are waiting to join."""
    MISTAKE = "mistake"
    """Manual intervention needed: no further try."""


SAVING = (Reason.LEAVING, Reason.GROWING)
"""Reasons for which the ranks are asked to save and exit. For all others but DONE they are killed."""
FRUITLESS = (Reason.FAILED, Reason.HUNG)
"""Reasons that count against the restart budget when there is no newer checkpoint."""


@dataclass(frozen=True)
class Ending:
    """Why a round ended, as recorded by the node that noticed it first."""

    round: int
    reason: Reason
    node: str
    """Where it happened: the node of the rank, the lost node, or else the node that noticed it."""
    text: str
    committed_step: int = -1
    details: dict[str, Any] = field(default_factory=dict)
    """Rank, step and phase (`section`) of the failure, where known."""


class Board:
    """Reads and writes the shared objects."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.url = storage.url

    def newest(self) -> int:
        """Number of the newest sealed round; 0 when there is none."""
        keys = (key.rpartition("/")[2].removesuffix(".json") for key, _ in self._list("sealed/"))
        return max((int(key) for key in keys if key.isdecimal()), default=0)

    def join(self, number: int, member: Member) -> None:
        """Ask to take part in a round."""
        self._storage.write(_join_key(number, member), sealed(asdict(member)))
        self._storage.delete(_left_key(number, member))

    def withdraw(self, number: int, member: Member) -> None:
        """Withdraw from a round, whether joined before or not."""
        self._storage.write(_left_key(number, member), b"")
        self._storage.delete(_join_key(number, member))

    def joined(self, number: int) -> Joined:
        """Return the nodes that ask to take part, without those of earlier starts of the job."""
        by_start: defaultdict[int, list[str]] = defaultdict(list)
        left: defaultdict[int, set[str]] = defaultdict(set)
        for key, _ in self._list(f"join/{number:06d}/"):
            start, name = key.split("/")[-2:]
            if name.endswith(_LEFT):
                left[int(start)].add(name.removesuffix(_LEFT))
            else:
                by_start[int(start)].append(name.removesuffix(".json"))
        newest = max(by_start, default=0)
        return Joined(newest, sorted(by_start[newest]), frozenset(left[newest]))

    def members(self, number: int, start: int, nodes: Sequence[str]) -> list[Member | None]:
        """Return the entries of these nodes; None for a node that has withdrawn since."""
        trees = self._read_all([f"{_join_folder(number, start)}/{node}.json" for node in nodes])
        return [Member(**tree) if tree else None for tree in trees]

    def seal(self, round_: Round) -> bool:
        """Fix the members; False if another node has done so before."""
        tree = asdict(round_)
        return self._storage.write_new(f"elastic/sealed/{round_.number:06d}.json", sealed(tree))

    def sealed(self, number: int) -> Round | None:
        """Return a sealed round; None while it is not sealed."""
        tree = self._read(f"elastic/sealed/{number:06d}.json")
        if tree is None:
            return None
        members = tuple(Member(**member) for member in tree["members"])
        return Round(**{**tree, "members": members})

    def end(self, ending: Ending) -> None:
        """Record why a round ended. An earlier reason stays.

        On a full disk nothing is recorded: the round continues until a later look finds free space.
        """
        with suppress(DiskFullError):
            self._storage.write_new(f"elastic/ended/{ending.round:06d}.json", sealed(asdict(ending)))

    def ending(self, number: int) -> Ending | None:
        """Return why a round ended; None while it is running."""
        tree = self._read(f"elastic/ended/{number:06d}.json")
        return Ending(**{**tree, "reason": Reason(tree["reason"])}) if tree else None

    def report(self, number: int, node: str, tree: dict[str, Any]) -> bool:
        """Write where the ranks of a node stand, replacing an earlier report; False if the disk is full."""
        try:
            self._storage.write(f"elastic/reports/{number:06d}/{node}.json", sealed(tree))
        except DiskFullError:
            return False
        return True

    def take_back(self, number: int, node: str) -> None:
        """Delete the report of a node whose ranks make progress again."""
        self._storage.delete(f"elastic/reports/{number:06d}/{node}.json")

    def reports(self, number: int) -> dict[str, dict[str, Any]]:
        """Return the reports, by node."""
        keys = [key for key, _ in self._list(f"reports/{number:06d}/")]
        reports = zip(keys, self._read_all(keys), strict=True)
        return {key.rpartition("/")[2].removesuffix(".json"): tree for key, tree in reports if tree}

    def renew_lease(self, node: str, count: int) -> None:
        """Write the counter of a node."""
        self._storage.write(f"elastic/leases/{node}.json", sealed({"count": count}))

    def lease(self, node: str) -> int:
        """Return the counter of a node; -1 if it never had one."""
        tree = self._read(f"elastic/leases/{node}.json")
        return tree["count"] if tree else -1

    def _list(self, prefix: str) -> list[tuple[str, int]]:
        return self._storage.list(f"elastic/{prefix}")

    def _read_all(self, keys: Sequence[str]) -> list[dict[str, Any] | None]:
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(self._read, keys))

    def _read(self, key: str) -> dict[str, Any] | None:
        where = f"{self.url}/{key}"
        try:
            return unseal_any(self._storage.read(key), where, StorageError)[0]
        except MissingKeyError:
            return None


def _join_folder(number: int, start: int) -> str:
    return f"elastic/join/{number:06d}/{start}"


def _join_key(number: int, member: Member) -> str:
    return f"{_join_folder(number, member.start)}/{member.node}.json"


def _left_key(number: int, member: Member) -> str:
    return f"{_join_folder(number, member.start)}/{member.node}{_LEFT}"
