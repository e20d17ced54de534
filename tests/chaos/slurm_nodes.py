"""Training on a real SLURM that takes nodes away: preemption, a lost daemon, a cut link, a node that hangs.

    python -m pytest tests/chaos/slurm_nodes.py

`make test` does not collect this file, because it takes a quarter of an hour on two busy cores; much of that
is spent in SLURM's own timeouts. `make chaos` runs it.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.cluster.slurm import Slurm, processes, slurm_cluster
from tests.support.cluster.slurm_training import (
    Job,
    assert_attempt_unchanged,
    assert_moved_on,
    assert_nothing_trains,
    assert_resumes_without,
    config_of,
    submit,
)
from tests.support.ranks.runs import events

pytestmark = pytest.mark.cluster

STEPS = 300
"""SLURM takes seconds to act on a job, and the job must not finish earlier."""


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    with slurm_cluster(nodes=3) as running:
        yield running


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm_nodes")


@pytest.fixture(scope="module")
def straight(top: Path) -> Job:
    """An undisturbed job."""
    with slurm_cluster(nodes=2) as slurm:
        job = submit(slurm, config_of(top, "straight", STEPS))
        assert job.wait() == ("COMPLETED", 0), job.log
    return job


def test_a_preempted_job_is_requeued(slurm: Slurm, top: Path, tmp_path: Path, straight: Job) -> None:
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
    """The processes there notice that they no longer belong to the job, save with the others, and exit."""
    job = submit(slurm, config_of(top, f"lost-{victim}", STEPS))
    job.wait_for_checkpoint()
    slurm.kill_daemon(victim)
    slurm.declare_down(victim)
    assert job.wait("PENDING")[0] == "PENDING", job.log
    assert_moved_on(job, victim)
    assert job.outcome() == straight.outcome()
    assert_nothing_trains(job, victim)


def test_a_hung_node_is_replaced_and_harmless_when_it_resumes(slurm: Slurm, top: Path, straight: Job) -> None:
    """The node has the batch script, so only the others can requeue the job."""
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
    assert_attempt_unchanged(job)


@pytest.mark.parametrize("victim", ["node1", "node2"])
def test_a_node_with_a_cut_link_is_replaced_and_exits(top: Path, straight: Job, victim: str) -> None:
    with slurm_cluster(nodes=3, cables=True) as slurm:
        job = submit(slurm, config_of(top, f"cut-{victim}", STEPS))
        job.wait_for_checkpoint(step=20)
        assert slurm.network is not None
        slurm.network.cut(victim)
        assert_resumes_without(job, victim)
    assert job.outcome() == straight.outcome()
