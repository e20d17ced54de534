"""How often a node says that it lives, and when another takes it for lost: on a clock that is set by hand."""

import itertools
from pathlib import Path

from dit_scale.elastic.board import Board, Ending, Member, Reason, Round
from dit_scale.elastic.lease import Leases
from dit_scale.storage import open_storage
from tests.support.faults.small_disk import fill, small_disk

LEASE_S = 10.0
ROUND = Round(1, tuple(Member(node, node, "", 0, 1, "") for node in "abc"), committed_step=-1)


def test_a_lease_is_renewed_five_times_in_its_length(board: Board) -> None:
    leases, moved_s, count = Leases(board, "a", LEASE_S), [], -1
    for tick in range(1001):  # ten times its length
        leases.renew(tick / 10)
        if board.lease("a") != count:
            moved_s.append(tick / 10)
            count = board.lease("a")
    print(f"renewed {len(moved_s) - 1} times in {100 / LEASE_S:g} leases")
    assert moved_s[0] == 0.0
    pauses_s = [later - earlier for earlier, later in itertools.pairwise(moved_s)]
    assert min(pauses_s) >= LEASE_S / 5
    assert max(pauses_s) <= LEASE_S / 5 + 0.11, "as soon as it is time"


def test_the_member_before_is_lost_when_its_lease_stands_still_for_too_long(board: Board) -> None:
    watcher = Leases(board, "b", LEASE_S)
    board.renew_lease("a", 7)
    watcher.watch(ROUND, 1, now_s=100.0)
    assert watcher.lost(105.0) is None  # seen for the first time
    assert watcher.lost(115.0) is None
    assert watcher.lost(115.1) == "a"
    board.renew_lease("a", 8)
    assert watcher.lost(115.2) is None
    assert watcher.lost(125.2) is None
    assert watcher.lost(125.3) == "a"


def test_who_never_had_a_lease_is_lost_too(board: Board) -> None:
    watcher = Leases(board, "a", LEASE_S)
    watcher.watch(ROUND, 0, now_s=100.0)
    assert watcher.lost(110.0) is None
    assert watcher.lost(110.1) == "c", "the last one is before the first"


def test_who_is_alone_watches_nobody(board: Board) -> None:
    watcher = Leases(board, "a", LEASE_S)
    watcher.watch(Round(1, ROUND.members[:1], committed_step=-1), 0, now_s=100.0)
    assert watcher.lost(1000.0) is None


def test_while_the_disk_is_full_nobody_is_taken_for_lost(tmp_path: Path) -> None:
    """Who cannot renew its lease gives its neighbour, who cannot either, the whole time from then on."""
    with small_disk(tmp_path / "disk", 2**20) as disk:
        board = Board(open_storage(disk))
        watcher, watched = Leases(board, "b", LEASE_S), Leases(board, "a", LEASE_S)
        watcher.watch(ROUND, 1, now_s=0.0)
        for now_s in range(10):
            watcher.renew(now_s)
            watched.renew(now_s)
            assert watcher.lost(now_s) is None
        filler = fill(disk)
        for now_s in range(10, 60):
            watcher.renew(now_s)
            watched.renew(now_s)
            assert watcher.lost(now_s) is None
        filler.unlink()
        for now_s in range(60, 66):  # the watched one is gone meanwhile
            watcher.renew(now_s)
            assert watcher.lost(now_s) is None
        watcher.renew(71)
        assert watcher.lost(71) == "a"


def test_what_there_is_no_room_for_is_said_later(tmp_path: Path) -> None:
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
