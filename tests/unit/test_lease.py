"""How often a node renews its lease, and when another considers it lost, on a clock that the tests set."""

import itertools
from pathlib import Path

from dit_scale.elastic.board import Board, Ending, Reason, Round
from dit_scale.elastic.lease import Lease, NeighbourWatch
from dit_scale.storage import open_storage
from tests.support.faults.small_disk import fill, small_disk
from tests.support.nodes.members import member_of

LEASE_S = 10.0
ROUND = Round(1, tuple(member_of(node) for node in "abc"), committed_step=-1)


def watch_by(board: Board, index: int, now_s: float = 100.0, round_: Round = ROUND) -> NeighbourWatch:
    """The watch of a member over the one before it."""
    lease = Lease(board, round_.members[index].node, LEASE_S)
    return NeighbourWatch(board, lease, round_, index, now_s)


def test_a_lease_is_renewed_five_times_in_its_length(board: Board) -> None:
    lease, renewed_s, count = Lease(board, "a", LEASE_S), [], -1
    for tick in range(1001):  # ten times its length
        lease.renew(tick / 10)
        if board.lease("a") != count:
            renewed_s.append(tick / 10)
            count = board.lease("a")
    print(f"renewed {len(renewed_s) - 1} times in {100 / LEASE_S:g} leases")
    assert renewed_s[0] == 0.0
    pauses_s = [later - earlier for earlier, later in itertools.pairwise(renewed_s)]
    assert min(pauses_s) >= LEASE_S / 5
    assert max(pauses_s) <= LEASE_S / 5 + 0.11, "as soon as it is due"


def test_the_member_before_is_lost_when_it_does_not_renew_its_lease(board: Board) -> None:
    board.renew_lease("a", 7)
    watcher = watch_by(board, 1)
    assert watcher.lost(105.0) is None  # seen for the first time
    assert watcher.lost(115.0) is None
    assert watcher.lost(115.1) == "a"
    board.renew_lease("a", 8)
    assert watcher.lost(115.2) is None
    assert watcher.lost(125.2) is None
    assert watcher.lost(125.3) == "a"


def test_a_node_that_never_had_a_lease_is_lost_too(board: Board) -> None:
    watcher = watch_by(board, 0)
    assert watcher.lost(110.0) is None
    assert watcher.lost(110.1) == "c", "the first member watches the last one"


def test_a_single_node_watches_nobody(board: Board) -> None:
    watcher = watch_by(board, 0, round_=Round(1, ROUND.members[:1], committed_step=-1))
    assert watcher.lost(1000.0) is None


def test_no_node_is_considered_lost_while_the_disk_is_full(tmp_path: Path) -> None:
    """A node that cannot renew its lease gives its neighbour a full lease from then on."""
    with small_disk(tmp_path / "disk", 2**20) as disk:
        board = Board(open_storage(disk))
        watching, watched = Lease(board, "b", LEASE_S), Lease(board, "a", LEASE_S)
        watcher = NeighbourWatch(board, watching, ROUND, 1, now_s=0.0)
        for now_s in range(10):
            watching.renew(now_s)
            watched.renew(now_s)
            assert watcher.lost(now_s) is None
        filler = fill(disk)
        for now_s in range(10, 60):
            watching.renew(now_s)
            watched.renew(now_s)
            assert watcher.lost(now_s) is None
        filler.unlink()
        for now_s in range(60, 66):  # the watched node has exited meanwhile
            watching.renew(now_s)
            assert watcher.lost(now_s) is None
        watching.renew(71)
        assert watcher.lost(71) == "a"


def test_what_a_full_disk_prevents_is_recorded_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        board = Board(open_storage(disk))
        ending = Ending(1, Reason.FAILED, "a", "rank 0 was killed")
        filler = fill(disk)
        board.end(ending)
        assert board.ending(1) is None
        assert not board.report(1, "a", {"failed": True})
        filler.unlink()
        board.end(ending)
        assert board.report(1, "a", {"failed": True})
        assert board.ending(1) == ending
        assert board.reports(1) == {"a": {"failed": True}}
