"""What the ranks of this node write for their supervisor in one round: heartbeats and verdicts."""

from pathlib import Path

from dit_scale.elastic.node.exits import Verdict, read_verdict
from dit_scale.heartbeat import Beat, beat_path, read_beat


class RankFiles:
    """The files of these ranks in a folder on this node."""

    def __init__(self, folder: Path, ranks: range) -> None:
        self.folder, self.ranks = folder, ranks
        self._heartbeats: dict[int, Beat] = {}

    def heartbeats(self) -> dict[int, Beat]:
        """Return the last complete heartbeat of each rank that has sent one."""
        for rank in self.ranks:
            if (beat := read_beat(beat_path(self.folder, rank))) is not None:
                self._heartbeats[rank] = beat
        return dict(self._heartbeats)

    def verdicts(self) -> dict[int, Verdict | None]:
        """Return the verdict of each rank; None while there is none."""
        return {rank: read_verdict(self.folder, rank) for rank in self.ranks}
