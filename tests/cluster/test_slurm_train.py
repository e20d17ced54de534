"""The training scripts cluster/slurm_*.sh, unchanged, on a real SLURM of two nodes."""

import os
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dit_scale.config import TrainConfig, dump
from dit_scale.elastic.board import Board
from dit_scale.train.run_folder import root_of
from tests.support.cluster.slurm import WAIT_S, Slurm, processes, slurm_cluster
from tests.support.cluster.slurm_training import (
    ENVIRONMENT,
    ROOT,
    Job,
    assert_nothing_trains,
    assert_resumes_without,
    config_of,
    submit,
)
from tests.support.ranks.runs import events

pytestmark = pytest.mark.cluster

ANY_SIZE = "cluster/slurm_train.sh"
MEASURED_STEPS = 20
"""After this many steps the deadline of a waiting rank is known."""
EVERY_OTHER = """\
#!/bin/sh
case "$*" in *"show job"*) if mkdir {mark} 2>/dev/null; then exit 1; else rmdir {mark}; fi ;; esac
exec {scontrol} "$@"
"""


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm_train")


@pytest.mark.parametrize("script", ["cluster/slurm_xl2_256.sh", "cluster/slurm_xl2_512.sh"])
def test_the_real_request_fits_a_real_cluster(slurm: Slurm, script: str) -> None:
    """On nodes of 64 CPUs and 8 GPUs the shipped request fits, and an impossible request is refused."""
    assert slurm.run("sbatch", "--test-only", "--nodes=1-2", script, cwd=ROOT).returncode == 0
    for too_much in ("--nodes=3", "--gpus-per-node=9", "--cpus-per-task=65"):
        ran = slurm.run("sbatch", "--test-only", "--nodes=2", too_much, script, cwd=ROOT)
        assert "Requested node configuration is not available" in ran.stderr


def documented_lines() -> list[str]:
    """Return the submissions in the header of the generic script, with a configuration for CONFIG."""
    header = (ROOT / ANY_SIZE).read_text().partition("#SBATCH")[0]
    lines = re.findall(r"^#   on .*?  (sbatch .*)$", header, re.MULTILINE)
    return [line.replace("CONFIG ...", "configs/dit_xl2_256.yaml") for line in lines]


def test_documented_submissions_fit_a_real_cluster(slurm: Slurm) -> None:
    assert len(documented_lines()) == 3
    for line, fits in zip(documented_lines(), (True, True, False), strict=True):
        command, options = line.split()[0], line.split()[1:]
        assert all((ROOT / word).exists() for word in options if word.startswith(("cluster/", "configs/")))
        ran = slurm.run(command, "--test-only", *options, cwd=ROOT)
        assert (ran.returncode == 0) == fits, ran.stderr
    ran = slurm.run(command, "--test-only", *(word.replace("=4", "=2") for word in options), cwd=ROOT)
    assert ran.returncode == 0, "the cluster has two such nodes"


def submit_any_size(slurm: Slurm, config: TrainConfig, *arguments: str) -> Job:
    """The generic script, unchanged, on the nodes that it requests by default."""
    run = Path(config.run)
    file = run.with_suffix(".yaml")
    file.write_text(dump(config))
    options = [f"--output={run}-%j.log"]
    number = slurm.submit(
        ANY_SIZE,
        str(file),
        *arguments,
        options=options,
        cwd=ROOT,
        environment=ENVIRONMENT | {"MIN_NODES": "1"},
    )
    return Job(slurm, config, number)


def test_by_default_one_node_trains_on_its_cpus(slurm: Slurm, top: Path) -> None:
    job = submit_any_size(slurm, config_of(top, "small", steps=2), "engine.precision=fp32", "--slots", "1")
    assert job.wait() == ("COMPLETED", 0), job.log
    assert "round 1: node 1 of 1 (node1)" in job.log
    assert job.newest() == (2, 1)


def test_a_job_without_gpus_logs_the_reason(slurm: Slurm, top: Path) -> None:
    job = submit_any_size(slurm, config_of(top, "without", steps=2), "engine.device=auto")
    assert job.wait() == ("FAILED", 93), job.log
    assert "engine.device=auto, but this SLURM job in partition low has no GPU: request GPUs" in job.log
    assert job.restarts() == 0


@pytest.fixture(scope="module")
def disturbed(top: Path) -> Job:
    """A job that receives the warning of its time limit and then loses the link to its first node."""
    with slurm_cluster(nodes=3, cables=True) as slurm:
        job = submit(slurm, config_of(top, "disturbed"), script="cluster/slurm_xl2_256.sh")
        job.wait_for_step()
        step = saves_and_requeues(job)
        job.wait_for_checkpoint(attempt=2, step=step + MEASURED_STEPS)
        assert events(job.config, "start")[1]["step"] == step
        assert slurm.network is not None
        slurm.network.cut("node1")
        slurm.declare_down("node1")
        job = job.ends_at(job.last_step() + 10)
        assert_resumes_without(job, "node1", attempt=2)
    return job


def saves_and_requeues(job: Job) -> int:
    """Send the time-limit warning to a job; return the step that it saved."""
    assert job.slurm.run("scancel", "--signal=USR1", "--batch", str(job.number)).returncode == 0
    assert job.wait("PENDING")[0] == "PENDING", job.log
    step, attempt = job.newest()
    assert attempt == 1
    assert 0 < step <= job.last_step()
    assert "requeueing the job" in job.log
    assert job.restarts() == 1
    assert_nothing_trains(job, "node1", "node2")
    return step


def test_a_job_survives_its_time_limit_and_a_cut_link(disturbed: Job) -> None:
    assert disturbed.newest() == (disturbed.config.steps, 3)
    first, second = (Board(root_of(disturbed.config)).sealed(number) for number in (1, 2))
    assert first is not None
    assert second is not None
    assert 0 < first.start < second.start


def test_disturbed_and_undisturbed_jobs_give_the_same_bits(
    slurm: Slurm, top: Path, disturbed: Job, tmp_path: Path
) -> None:
    """The job resumes even when the controller fails every other query."""
    programs = tmp_path / "programs"
    programs.mkdir()
    scontrol = programs / "scontrol"
    scontrol.write_text(EVERY_OTHER.format(mark=tmp_path / "mark", scontrol=shutil.which("scontrol")))
    scontrol.chmod(0o755)
    job = submit(slurm, config_of(top, "straight", disturbed.config.steps), programs=programs)
    assert job.wait() == ("COMPLETED", 0), job.log
    assert job.restarts() == 0
    assert "the allocation has changed" not in job.log
    assert "(node1, node2)" in job.log
    assert len(events(job.config, "start")) == 1
    assert disturbed.outcome() == job.outcome()


def test_configuration_errors_are_not_restarted(slurm: Slurm, top: Path) -> None:
    one_node = ("--nodes=1", "--export=ALL,MIN_NODES=1")
    hopeless = submit(slurm, config_of(top, "hopeless"), "model.num_classes=4", options=one_node)
    mistaken = submit(slurm, config_of(top, "mistaken"), "optimizer.lrr=1")
    assert hopeless.wait() == ("FAILED", 93), hopeless.log
    assert mistaken.wait() == ("FAILED", 93), mistaken.log
    assert "num_classes" in hopeless.log
    assert "unknown key 'optimizer.lrr'" in mistaken.log
    assert hopeless.restarts() == mistaken.restarts() == 0


def kill_supervisors(job: Job) -> None:
    """SIGKILL `dit-scale launch` on both nodes as soon as it runs."""
    until = time.monotonic() + WAIT_S
    for node in ("node1", "node2"):
        while not (found := [pid for pid in processes(job.number, node) if is_supervisor(pid)]):
            assert time.monotonic() < until
            time.sleep(0.05)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_supervisor(pid: int) -> bool:
    try:
        return b"dit-scale\0launch\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def test_an_error_is_retried_up_to_the_limit(slurm: Slurm, top: Path) -> None:
    job = submit(slurm, config_of(top, "failing"), options=("--export=ALL,MAX_RESTARTS=1",))
    kill_supervisors(job)
    assert job.wait("PENDING")[0] == "PENDING", job.log
    assert job.wait("RUNNING")[0] == "RUNNING", job.log
    kill_supervisors(job)
    assert job.wait()[0] == "FAILED", job.log
    assert job.restarts() == 1
    assert "exit code 137 after 1 restarts; MAX_RESTARTS allows no more" in job.log
