"""The disk of the run, its checkpoints and its board is full for a while: the same ranks continue."""

from pathlib import Path

import pytest

from dit_scale.elastic.node.preflight import SPARE_BYTES
from tests.support.faults.small_disk import fill, small_disk
from tests.support.nodes.nodes import cluster, config_of
from tests.support.ranks import jobs
from tests.support.ranks.runs import events

pytestmark = pytest.mark.dist


def test_a_disk_is_full_for_a_while(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", SPARE_BYTES + 400 * 2**20) as disk:
        config = config_of(tmp_path, steps=400, every_steps=10)
        (disk / "run").mkdir()
        Path(config.run).symlink_to(disk / "run")
        with cluster(config) as nodes:
            node = nodes.start("a")
            nodes.wait_for_step(20)
            ranks = node.ranks()

            def cannot_write_its_record() -> bool:
                fill(disk)  # again and again: a save that fails removes its file
                return node.says("jsonl cannot be written: No space left on device")

            nodes.wait(cannot_write_its_record, "alarm")
            failed = node.log.read_text().count("was not saved")
            nodes.wait(
                lambda: node.log.read_text().count("was not saved") > failed + 2, "two more failed saves"
            )
            assert node.ranks() == ranks
            (disk / "filler").unlink()
            assert node.exit_code() == 0
            assert node.endings() == [("done", "a")]
            assert not node.says("Traceback")
        assert [row["step"] for row in jobs.losses(config)] == list(range(1, 401))
        assert len(events(config, "start")) == 1
        assert events(config, "alarm")
