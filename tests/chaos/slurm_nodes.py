"""Training on a real SLURM that takes nodes away: preemption, a lost daemon, a cut link, a node that hangs.

    python -m pytest tests/chaos/slurm_nodes.py

`make test` does not collect it, for most of its five minutes are time limits of SLURM; `make chaos` runs it.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dit_scale.checkpoint.manifest import CHECKPOINTS, MANIFEST, step_and_attempt
from dit_scale.train.run import root_of
from tests.cluster.slurm import WAIT_S, Slurm, processes, slurm_cluster
from tests.cluster.slurm_training import Job, config_of, submit
from tests.dist.runs import events

pytestmark = pytest.mark.cluster

STEPS = 300
"""SLURM takes seconds until it does something to a job; it must not be done by then."""


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    with slurm_cluster(nodes=3) as running:
        yield running


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm_nodes")


@pytest.fixture(scope="module")
def straight(top: Path) -> Job:
    """A job that nobody disturbs."""
    with slurm_cluster(nodes=2) as slurm:
        job = submit(slurm, config_of(top, "straight", STEPS))
        assert job.wait() == ("COMPLETED", 0), job.log
    return job


def test_a_preempted_job_comes_back(slurm: Slurm, top: Path, tmp_path: Path, straight: Job) -> None:
    job = submit(slurm, config_of(top, "preempted", STEPS))
    job.wait_for_checkpoint()
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/sh\nexit 0\n")
    options = ["--partition=high", "--nodes=3", "--exclusive", f"--output={tmp_path}/urgent.log"]
    urgent = slurm.submit(script, options=options)
    assert slurm.wait(urgent) == ("COMPLETED", 0)
    assert job.restarts() == 1
    assert job.newest()[0] < job.config.steps
    assert job.wait() == ("COMPLETED", 0), job.log
    assert job.restarts() == 1
    assert events(job.config, "start")[1]["step"] > 0
    assert job.outcome() == straight.outcome()


@pytest.mark.parametrize("victim", ["node1", "node2"])
def test_a_node_without_its_daemon_is_replaced(slurm: Slurm, top: Path, straight: Job, victim: str) -> None:
    """What runs there notices that it is not of the job any more, saves with the others and leaves."""
    job = submit(slurm, config_of(top, f"lost-{victim}", STEPS))
    job.wait_for_checkpoint()
    slurm.kill_daemon(victim)
    slurm.declare_down(victim)
    assert job.wait("PENDING")[0] == "PENDING", job.log
    assert_moved_on(job, victim)
    assert job.outcome() == straight.outcome()
    assert_nothing_trains(job, victim)


def test_a_node_that_hangs_is_replaced_and_does_no_harm_when_it_wakes_up(
    slurm: Slurm, top: Path, straight: Job
) -> None:
    """The node with the batch script, so that nobody but the others can queue the job again."""
    job = submit(slurm, config_of(top, "hung", STEPS), "--lease-s", "10")
    job.wait_for_checkpoint()
    frozen = processes(job.number, "node1")
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    slurm.kill_daemon("node1")
    try:
        job.wait_for_checkpoint(attempt=2)
    finally:
        for pid in frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert_moved_on(job, "node1")
    assert_nothing_trains(job, "node1")
    assert job.outcome() == straight.outcome()
    assert_the_first_attempt_stayed_as_it_was(job)


@pytest.mark.parametrize("victim", ["node1", "node2"])
def test_a_node_whose_link_is_cut_is_replaced_and_makes_way(top: Path, straight: Job, victim: str) -> None:
    """What is left running there still reaches the storage, and sees by it that it is not needed any more."""
    with slurm_cluster(nodes=3, cables=True) as slurm:
        config = config_of(top, f"cut-{victim}", STEPS)
        job = submit(slurm, config, script="cluster/slurm_xl2_256.sh")
        job.wait_for_checkpoint(step=20)  # a hang is found by the time that steps take: 16 are measured
        assert slurm.network is not None
        slurm.network.cut(victim)
        job.wait_for_checkpoint(attempt=2)
        assert_made_way(job, victim)
        slurm.network.mend(victim)
        assert_moved_on(job, victim)
        assert_nothing_trains(job, victim)
    assert job.outcome() == straight.outcome()
    assert_the_first_attempt_stayed_as_it_was(job)


def assert_the_first_attempt_stayed_as_it_was(job: Job) -> None:
    """Nothing was committed by it after the second one had gone on from it."""
    resumed = events(job.config, "start")[1]["step"]
    root = root_of(job.config)
    names = [key.split("/")[1] for key, _ in root.list(f"{CHECKPOINTS}/") if key.endswith(MANIFEST)]
    old = [step for step, attempt in map(step_and_attempt, names) if attempt == 1]
    assert all(step <= resumed for step in old), names


def assert_made_way(job: Job, node: str) -> None:
    """The supervisor there, which SLURM cannot reach, has left by itself with its ranks."""
    until = time.monotonic() + WAIT_S
    while (said := supervisor_events(job, node))[-1] != "made_way":
        assert time.monotonic() < until, said
        time.sleep(0.2)


def supervisor_events(job: Job, node: str) -> list[str]:
    """Names of the events in its journal."""
    lines = Path(job.config.run, "supervisors", f"{node}.jsonl").read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


def assert_moved_on(job: Job, victim: str) -> None:
    """It was queued again, once, and ended on the other nodes."""
    assert job.wait() == ("COMPLETED", 0), job.log
    assert job.restarts() == 1
    nodes = job.slurm.job(job.number)["NodeList"]
    assert nodes == {"node1": "node[2-3]", "node2": "node[1,3]"}[victim]


def assert_nothing_trains(job: Job, node: str) -> None:
    """No process of the job is left there, although SLURM could not end it."""
    until = time.monotonic() + WAIT_S
    while left := processes(job.number, node):
        assert time.monotonic() < until, left
        time.sleep(0.2)
