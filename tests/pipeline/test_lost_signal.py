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


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=scaled(300.0),
    )


STUCK_JOB = """
import contextlib, ctypes, os, signal, threading, time
import psutil
from dit_scale_pipeline.ray_cluster import cluster

about_to_lock = threading.Event()

def end_ray():
    about_to_lock.wait()
    time.sleep(2)
    if {interrupted}:
        os.kill(os.getpid(), signal.SIGHUP)
    (raylet,) = [child for child in psutil.Process().children() if child.name() == "raylet"]
    raylet.kill()

with cluster("local"):
    threading.Thread(target=end_ray).start()
    mutex = ctypes.create_string_buffer(64)
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # if the signal arrives before the lock
            about_to_lock.set()
            ctypes.CDLL(None).pthread_mutex_lock(mutex)  # the second one never returns, whatever arrives
"""


@pytest.mark.parametrize(
    ("interrupted", "code", "words"),
    [(True, 130, "interrupted; run the same command again"), (False, 2, "lost the Ray cluster at local")],
)
def test_a_signal_counts_while_foreign_code_has_the_main_thread(
    interrupted: bool, code: int, words: str
) -> None:
    done = run(STUCK_JOB.format(interrupted=interrupted))
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize(("interrupted", "raised"), [(True, "KeyboardInterrupt"), (False, "DeviceError")])
def test_a_lost_cluster_after_a_signal_is_an_interrupt(interrupted: bool, raised: str) -> None:
    done = run(JOB.format(interrupted=interrupted))
    # Ray itself prints what it knows about its end.
    assert done.stdout.splitlines()[-1] == raised, done.stderr
