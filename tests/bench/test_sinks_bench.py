"""The benchmark of the sinks runs, and its cases write what they say; speed is not tested."""

import json
import subprocess
import sys

import pytest

from tests.support.speed import scaled


@pytest.mark.dist
def test_every_case_writes_its_rows() -> None:
    command = [sys.executable, "-m", "benchmarks.sinks", "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(300.0), check=True)
    found = json.loads(done.stdout)
    assert {"wandb", "tensorboard"} <= set(found["mirrors"])
    cases = [(cost["every_steps"], cost["mirrors"], cost["rows"]) for cost in found["costs"]]
    assert cases == [(20, False, 1), (20, True, 1), (10, False, 2), (10, True, 2)]
    for cost in found["costs"]:
        assert cost["loop_ms"] > 0
        assert cost["share"] == pytest.approx(cost["cpu_ms"] / 50)
    assert found["scrape"]["log_points"] == 100
    assert found["scrape"]["later_ms"] > 0
