"""A local Ray that fails to start is retried, and one that shuts down slowly does not count as lost."""

import subprocess
import sys

import pytest

from tests.support.encoding import ROOT, clean_environment
from tests.support.speed import scaled

pytestmark = pytest.mark.pipeline

STARTED_ANEW = """
import threading, time, psutil, ray
from dit_scale_pipeline import ray_start

def kill_the_first():
    while True:
        for child in psutil.Process().children():
            if child.name() == "raylet":
                return child.kill()
        time.sleep(0.01)

killer = threading.Thread(target=kill_the_first)
killer.start()
ray_start.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error")
assert not killer.is_alive()
print(sum(node["Alive"] for node in ray.nodes()), "node")
"""
ENDED_SLOWLY = """
import time, ray
from dit_scale_pipeline import ray_cluster

ray_cluster.PING_S, ray_cluster.NODE_LOST_S = 0.05, 0.2
shutdown = ray.shutdown

def slow_shutdown():
    shutdown()
    time.sleep(2)

ray.shutdown = slow_shutdown
with ray_cluster.cluster("local"):
    pass
print("ended")
"""


@pytest.mark.parametrize(("script", "said"), [(STARTED_ANEW, "1 node"), (ENDED_SLOWLY, "ended")])
def test_a_local_ray_starts_and_ends_on_a_slow_machine(script: str, said: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "data_pipeline",
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=scaled(600.0),
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, said), ran.stderr
