"""What the supervisors of a run tell each other: objects in the run's storage, so that no host is needed.

    elastic/join/<round>/<start>/<node>.json who would take part in a round; <start>: of the whole job
    elastic/join/<round>/<start>/<node>.left who would not any more, and is not waited for
    elastic/sealed/<round>.json        who does; put under a condition, so there is one answer
    elastic/ended/<round>.json         why it ended; likewise, the first reason counts
    elastic/reports/<round>/<node>.json how the ranks of a node stand, when they broke off or do not get on
    elastic/leases/<node>.json         a counter that a living supervisor moves on

A round is one try to train with a fixed set of nodes. Clocks of different nodes are never compared.
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
"""Objects read at once: one after another, those of thousands of nodes would take a minute on S3."""


@dataclass(frozen=True)
class Member:
    """A node that would take part."""

    node: str
    boot: str
    """Differs between two starts of its supervisor."""
    address: str
    port: int
    """Free on the node, for the rendezvous of the ranks if it is the first."""
    slots: int
    """Ranks that it runs."""
    config_sha256: str
    """Of its resolved configuration."""
    start: int = 0
    """Of the whole job: a later start has a larger number, and takes over."""


@dataclass(frozen=True)
class Joined:
    """Who would take part in a round, of the newest start alone."""

    start: int = 0
    nodes: list[str] = field(default_factory=list)
    """Their names, sorted."""
    left: frozenset[str] = frozenset()
    """Who has left since the round before."""


@dataclass(frozen=True)
class Round:
    """Who takes part, in the order of the ranks."""

    number: int
    members: tuple[Member, ...]
    committed_step: int
    """Newest one when it began; -1 when there was none."""
    fruitless: int = 0
    """Failures in a row before it, without a newer committed step."""

    @property
    def world(self) -> int:
        return sum(member.slots for member in self.members)

    @property
    def start(self) -> int:
        """Of the job: the same of all members."""
        return self.members[0].start

    @cached_property
    def places(self) -> dict[str, int]:
        """Of the members, by node, in their order."""
        return {member.node: place for place, member in enumerate(self.members)}

    def index_of(self, node: str) -> int | None:
        """Place of a node among the members."""
        return self.places.get(node)


class Reason(StrEnum):
    """Why a round ended."""

    DONE = "done"
    FAILED = "failed"
    """A rank died, or left with an error that another try may not meet."""
    HUNG = "hung"
    LOST = "lost"
    """A node does not answer any more."""
    LEAVING = "leaving"
    """A scheduler wants a node back."""
    GROWING = "growing"
    """More nodes are there."""
    MISTAKE = "mistake"
    """What a person must mend: no further try."""


SAVING = (Reason.LEAVING, Reason.GROWING)
"""The ranks are asked to save and leave; in all other cases they are ended."""
FRUITLESS = (Reason.FAILED, Reason.HUNG)
"""What counts against the budget of restarts when nothing newer was committed."""


@dataclass(frozen=True)
class Ending:
    """Why a round ended, as whoever noticed first says it."""

    round: int
    reason: Reason
    node: str
    """Where it was noticed; of a lost node, the lost one."""
    text: str
    committed_step: int = -1
    details: dict[str, Any] = field(default_factory=dict)


class Board:
    """The objects, by round."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.url = storage.url

    def newest(self) -> int:
        """Number of the newest round that was sealed; 0 when none was."""
        keys = (key.rpartition("/")[2].removesuffix(".json") for key, _ in self._list("sealed/"))
        return max((int(key) for key in keys if key.isdecimal()), default=0)

    def join(self, number: int, member: Member) -> None:
        self._storage.write(_join_key(number, member), _dump(asdict(member)))
        self._storage.delete(_left_key(number, member))

    def withdraw(self, number: int, member: Member) -> None:
        """Take no part, whether joined before or not."""
        self._storage.write(_left_key(number, member), b"")
        self._storage.delete(_join_key(number, member))

    def joined(self, number: int) -> Joined:
        """Who would take part; what is left of earlier starts does not count."""
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
        """What these nodes said when they joined; None of one that withdrew since."""
        trees = self._read_all([f"{_join_folder(number, start)}/{node}.json" for node in nodes])
        return [Member(**tree) if tree else None for tree in trees]

    def seal(self, round_: Round) -> bool:
        """Fix the members; False when somebody has done so before."""
        tree = asdict(round_)
        return self._storage.write_new(f"elastic/sealed/{round_.number:06d}.json", _dump(tree))

    def sealed(self, number: int) -> Round | None:
        tree = self._read(f"elastic/sealed/{number:06d}.json")
        if tree is None:
            return None
        members = tuple(Member(**member) for member in tree["members"])
        return Round(**{**tree, "members": members})

    def end(self, ending: Ending) -> None:
        """Say why a round ended; an earlier reason stays.

        On a full disk nothing is said: the round goes on until somebody who looks again finds room.
        """
        with suppress(DiskFullError):
            self._storage.write_new(f"elastic/ended/{ending.round:06d}.json", _dump(asdict(ending)))

    def ending(self, number: int) -> Ending | None:
        tree = self._read(f"elastic/ended/{number:06d}.json")
        return Ending(**{**tree, "reason": Reason(tree["reason"])}) if tree else None

    def report(self, number: int, node: str, tree: dict[str, Any]) -> bool:
        """Say how the ranks of a node stand, in place of what was said before.

        False when there is no room for it.
        """
        try:
            self._storage.write(f"elastic/reports/{number:06d}/{node}.json", _dump(tree))
        except DiskFullError:
            return False
        return True

    def take_back(self, number: int, node: str) -> None:
        """They get on again."""
        self._storage.delete(f"elastic/reports/{number:06d}/{node}.json")

    def reports(self, number: int) -> dict[str, dict[str, Any]]:
        """What the nodes say of their ranks, by node."""
        keys = [key for key, _ in self._list(f"reports/{number:06d}/")]
        found = zip(keys, self._read_all(keys), strict=True)
        return {key.rpartition("/")[2].removesuffix(".json"): tree for key, tree in found if tree}

    def renew_lease(self, node: str, count: int) -> None:
        self._storage.write(f"elastic/leases/{node}.json", _dump({"count": count}))

    def lease(self, node: str) -> int:
        """The counter of a node; -1 when it never had one."""
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


def _dump(tree: dict[str, Any]) -> bytes:
    return sealed(tree)
