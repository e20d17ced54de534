"""A signal can end the local Ray before the job notices it: that is an interrupt, not a lost cluster."""

import subprocess
import sys

import pytest

from tests.support.encoding import clean_environment
from tests.support.speed import scaled

pytestmark = pytest.mark.pipeline

JOB = """
import contextlib, os, signal, sys, time
import psutil
from dit_scale_pipeline.ray_cluster import cluster

try:
    with cluster("local"):
        if {interrupted}:
            with contextlib.suppress(KeyboardInterrupt):  # as foreign code can lose it
                signal.raise_signal(signal.SIGHUP)
        (raylet,) = [child for child in psutil.Process().children() if child.name() == "raylet"]
        raylet.kill()
        while True:
            time.sleep(0.1)
except BaseException as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(("interrupted", "raised"), [(True, "KeyboardInterrupt"), (False, "DeviceError")])
def test_a_lost_cluster_after_a_signal_is_an_interrupt(interrupted: bool, raised: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", JOB.format(interrupted=interrupted)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=scaled(300.0),
    )
    # Ray itself prints what it knows about its end.
    assert done.stdout.splitlines()[-1] == raised, done.stderr
