"""The journal of a run tells what it runs on: versions of programs, and the devices of all ranks."""

import platform
from pathlib import Path

import pytest
import torch

from dit_scale import dist
from dit_scale.config import EngineConfig
from dit_scale.train.environment import environment
from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.processes import run
from tests.support.ranks.runs import events

pytestmark = pytest.mark.dist


def environment_of_a_rank() -> dict[str, object]:
    world = dist.start(EngineConfig(device="cpu"))
    try:
        return environment(world)
    finally:
        dist.stop()


def test_it_counts_the_devices_of_all_ranks() -> None:
    first, second = run(2, environment_of_a_rank)
    assert first == second
    assert list(first["devices"].values()) == [2]


def test_the_start_of_an_attempt_records_it(tmp_path: Path) -> None:
    write_latents(tmp_path / "data")
    config = jobs.small_config(tmp_path / "run", tmp_path / "data", precision="fp32")
    assert run(1, jobs.train, config) == [0]
    (start,) = events(config, "start")
    versions = start["environment"]["versions"]
    assert (versions["torch"], versions["python"]) == (torch.__version__, platform.python_version())
    assert sum(start["environment"]["devices"].values()) == 1
