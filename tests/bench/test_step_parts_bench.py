"""The step-parts benchmark runs on real ranks, and the parts add up to the step."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = (
    "model.name=DiT-Nano/2",
    "model.image_size=32",
    "global_batch=4",
    "engine.micro_batch=2",
    "engine.precision=fp32",
)


@pytest.mark.dist
def test_parts_and_operators_add_up() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.step_parts",
        str(ROOT / "configs" / "demo.yaml"),
    ]
    done = subprocess.run(
        [*command, *SMALL, "--processes", "2", "--steps", "3"], capture_output=True, text=True, check=True
    )
    by_part, by_operator = done.stdout.split("by operator")
    assert "in fp32 on 2 x CPU, 4 images per step" in by_part
    ms = {
        name: float(value) for name, value in re.findall(r"^ (\S.*?) +(-?[\d.]+) +-?[\d.]+%", by_part, re.M)
    }
    whole = ms.pop("whole step")
    assert {"draws", "forward pass", "moving averages"} < ms.keys()
    assert all(value > 0 for part, value in ms.items() if part != "everything else"), ms
    assert sum(ms.values()) == pytest.approx(whole, abs=0.1)
    assert "aten::" in by_operator
    assert re.search(r"^ \d+ others ", by_operator, re.M)
