"""Claiming the number of an attempt on a full disk."""

from pathlib import Path

import pytest

from dit_scale.checkpoint import attempts
from dit_scale.errors import StorageError, SupersededError
from dit_scale.storage import open_storage
from dit_scale.train import claim
from tests.support.faults.small_disk import fill, small_disk


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "PAUSE_S", 0.0)


def test_a_claim_waits_for_space_and_reports_it_once(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        root, reports = open_storage(disk), list[str]()
        filler, beats = fill(disk), iter(range(100))

        def beat() -> None:
            if next(beats) == 3:
                filler.unlink()

        claim.claim(root, claim.next_attempt(root, None, (), None), 1000.0, beat, reports.append)
        assert attempts.numbers(root) == [1]
        assert next(beats) == 4
        assert len(reports) == 1
        assert "waiting for free space: cannot write" in reports[0]


def test_a_claim_fails_if_another_process_starts_meanwhile(tmp_path: Path) -> None:
    """The other process may have saved since, so the waiting one would resume from an old checkpoint."""
    with small_disk(tmp_path / "disk", 2**20) as disk:
        root, filler, beats = open_storage(disk), fill(disk), iter(range(100))

        def beat() -> None:
            if next(beats) == 1:
                filler.unlink()
                attempts.claim(root, claim.next_attempt(root, None, (), None))

        mine = claim.next_attempt(root, None, (), None)
        with pytest.raises(SupersededError):
            claim.claim(root, mine, 1000.0, beat, print)
        assert attempts.numbers(root) == [1]


def test_a_claim_gives_up(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        fill(disk)
        root = open_storage(disk)
        with pytest.raises(StorageError, match=r"No space left on device.*waited 0 s for free space"):
            claim.claim(root, claim.next_attempt(root, None, (), None), 0.0, lambda: None, print)
