"""The encoding benchmark runs and its figures are consistent; speed is not tested."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.speed import scaled

MODULE = "benchmarks.encode"


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", MODULE, "--smoke", "--json"]
    ran = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=scaled(300.0))
    assert ran.returncode == 0, ran.stderr
    return {row["what"]: row for row in map(json.loads, ran.stdout.splitlines())}


def test_every_part_has_a_row_with_device_and_versions(rows: dict[str, dict[str, Any]]) -> None:
    assert list(rows) == ["decode", "pipeline", "encoder"]
    for row in rows.values():
        assert row["images_per_s"] > 0
        assert row["device"]
        assert {"torch", "ray", "pillow", "diffusers"} <= row["versions"].keys()


def test_ratios_match_their_figures(rows: dict[str, dict[str, Any]]) -> None:
    decode, pipeline, encoder = rows.values()
    assert decode["ratio"] == pytest.approx(decode["images_per_s"] / decode["plain_images_per_s"])
    assert pipeline["efficiency"] == pytest.approx(pipeline["images_per_s"] / pipeline["stub_images_per_s"])
    assert pipeline["efficiency"] > 0
    assert encoder["share_of_matmul"] > 0
    assert encoder["times_plain fp32"] > 0
