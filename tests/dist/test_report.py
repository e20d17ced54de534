"""The report of a real run of two processes that was killed twice: no step twice, a mark at each restart."""

import json
from pathlib import Path

import pytest

from dit_scale.config import TrainConfig
from dit_scale.report.page.contents import RunReader
from dit_scale.report.page.document import document
from dit_scale.report.page.panels import PANELS, series_of
from tests.support.evaluated_run import write_ground
from tests.support.ranks import jobs
from tests.support.ranks.processes import run
from tests.support.ranks.runs import events, kill_at

pytestmark = pytest.mark.dist

WORLD, STEPS = 2, 12


def test_a_run_that_was_killed_twice(tmp_path: Path) -> None:
    ground = write_ground(tmp_path / "ground")
    base = jobs.small_config(tmp_path / "run", Path(ground["url"]))
    tree = base.model_dump(mode="json") | {"steps": STEPS}
    tree["evaluate"] = {"every_steps": 4, "held_out": 0.2, "grid_images": 4, "sampling_steps": 2}
    tree["data"] |= {"vae": ground["vae"]}
    tree["checkpoint"] |= {"every_steps": 3}
    config = TrainConfig.model_validate(tree)
    reader = RunReader(config.run, "run")
    for number in range(2):
        kill_at(WORLD, config, tmp_path / f"hold{number}", point="between optimizer and EMA", nth=6, victim=1)
        reader.read(0.0)
    assert run(WORLD, jobs.train, config) == [0] * WORLD

    starts = events(config, "start")
    page = reader.read(starts[-1]["time_s"] + 60)
    assert [step for step, _ in page.restarts] == [start["step"] for start in starts[1:]] == [3, 6]
    assert page.curves["loss"].x.tolist() == list(range(1, STEPS + 1))
    assert page.curves["eval_loss_raw"].x.tolist() == [*page.grids["power"]] == [0, 4, 8, 12]
    assert [*page.grids] == ["constant", "power"]
    rows = [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
    assert page.curves["loss"].y.tolist() == [row["loss"] for row in rows if "loss" in row]
    # A chart shows every key of a log point, except those of its axis.
    shown = {key for panel in PANELS for key in series_of(panel, page.curves)}
    assert {key for row in rows for key in row} - shown == {"step", "samples"}

    html = document([page], starts[-1]["time_s"] + 60)
    assert "all 12 steps are taken and saved" in html
    assert '"step":8,"uri":"data:image/webp;base64,' in html
    assert f'torch version</th><td class="text long">{starts[-1]["environment"]["versions"]["torch"]}' in html
