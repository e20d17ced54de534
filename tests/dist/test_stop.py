"""A process that leaves its process group has no group threads left; a running one would abort it at exit."""

import subprocess
import sys

import pytest

from tests.support.speed import scaled

pytestmark = pytest.mark.dist

PROGRAM = """
from pathlib import Path
from dit_scale import dist
from dit_scale.config import EngineConfig

def names():
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))

world = dist.start(EngineConfig(device="cpu"))
import torch._dynamo  # as diffusers does
world.gather(0)
assert any("gloo" in name for name in names()), names()
dist.stop()
del world
assert not any("gloo" in name for name in names()), names()
"""


def test_no_thread_of_the_group_outlives_it() -> None:
    command = [sys.executable, "-c", PROGRAM]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=scaled(300.0))
    assert ran.returncode == 0, ran.stderr
