"""A small training run as a job of the shipped script: tests submit, follow and compare it."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import CHECKPOINTS, MANIFEST, CheckpointId
from dit_scale.config import TrainConfig, dump
from dit_scale.journal import read_journal
from dit_scale.train.run_folder import root_of
from tests.support.cluster.slurm import WAIT_S, Slurm, processes
from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.record import last_step
from tests.support.ranks.runs import events, final_files

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "cluster/slurm_xl2_512.sh"
STEPS = 100_000
"""More than a job reaches before a test sets its last step."""
SMALL = ("--nodes=2", "--cpus-per-task=1", "--gpus-per-node=1", "--mem=1G", "--time=30")
"""A request that leaves room for another job on the same nodes; one rank per GPU."""
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "MIN_NODES": "2",  # the bits are the same at the same world size
    "WATCH_S": "1",
}


@dataclass(frozen=True)
class Job:
    """A run, and the job that trains it."""

    slurm: Slurm
    config: TrainConfig
    number: int

    @property
    def log(self) -> str:
        return Path(f"{self.config.run}-{self.number}.log").read_text()

    def wait(self, state: str = "") -> tuple[str, int]:
        return self.slurm.wait(self.number, state)

    def restarts(self) -> int:
        return int(self.slurm.job(self.number)["Restarts"])

    def newest(self) -> tuple[int, int]:
        """Return step and attempt of the newest checkpoint; zeros while there is none."""
        ids = committed(root_of(self.config))
        return (ids[0].step, ids[0].attempt) if ids else (0, 0)

    def wait_for_step(self) -> None:
        """Wait until the first step is in the record."""
        self._until(lambda: self.last_step() > 0)

    def ends_at(self, steps: int) -> "Job":
        """Return the same job with another last step, which its next start reads."""
        config = self.config.model_copy(update={"steps": steps})
        Path(config.run).with_suffix(".yaml").write_text(dump(config))
        return replace(self, config=config)

    def last_step(self) -> int:
        """Return the last step in the record."""
        return last_step(Path(self.config.run) / "metrics.jsonl")

    def wait_for_checkpoint(self, attempt: int = 1, step: int = 1) -> None:
        """Wait until this attempt or a later one has committed this step or a later one."""
        self._until(lambda: self.newest()[1] >= attempt and self.newest()[0] >= step)

    def _until(self, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + WAIT_S
        while not is_so():
            state = self.slurm.job(self.number)["JobState"]
            assert state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING") or is_so(), self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.05)

    def outcome(self) -> tuple[list[jobs.LossRow], list[bytes]]:
        """Return loss and gradient norm of every step, and every rank's file of the last checkpoint."""
        return jobs.losses(self.config), final_files(self.config)


def config_of(top: Path, name: str, steps: int = STEPS) -> TrainConfig:
    """Return the configuration of a run of two ranks in folder `name`; runs in `top` share their latents."""
    data = top / "latents"
    if not data.exists():
        write_latents(data, num=40)
    return jobs.saving(jobs.small_config(top / name, data, "DiT-Ti/2"), steps, every_steps=10)


def submit(
    slurm: Slurm,
    config: TrainConfig,
    *arguments: str,
    script: str = SCRIPT,
    options: tuple[str, ...] = (),
    programs: Path | None = None,
) -> Job:
    """Submit the shipped script, unchanged, with this configuration; `programs` come first in its PATH."""
    path = ENVIRONMENT["PATH"] if programs is None else f"{programs}:{ENVIRONMENT['PATH']}"
    run = Path(config.run)
    run.parent.mkdir(exist_ok=True)
    file = run.with_suffix(".yaml")
    file.write_text(dump(config))
    number = slurm.submit(
        script,
        *("--config", str(file), *arguments),
        options=[*SMALL, *options, f"--output={run}-%j.log"],
        cwd=ROOT,
        environment=ENVIRONMENT | {"PATH": path},
    )
    return Job(slurm, config, number)


def assert_resumes_without(job: Job, victim: str, attempt: int = 1) -> None:
    """Check a job that just lost the link to a node: it resumes elsewhere, and the processes there exit.

    Those processes still reach the storage, which shows them that they are superseded. `attempt` is the one
    that was cut off.
    """
    job.wait_for_checkpoint(attempt=attempt + 1)
    assert_superseded_ranks_exited(job, victim)
    assert job.slurm.network is not None
    job.slurm.network.mend(victim)
    assert_moved_on(job, victim, attempt)
    assert_attempt_unchanged(job, attempt)


def assert_attempt_unchanged(job: Job, attempt: int = 1) -> None:
    """Check that an attempt committed nothing after the next one resumed from it."""
    resumed = events(job.config, "start")[attempt]["step"]
    root = root_of(job.config)
    names = [key.split("/")[1] for key, _ in root.list(f"{CHECKPOINTS}/") if key.endswith(MANIFEST)]
    old = [one.step for one in filter(None, map(CheckpointId.parse, names)) if one.attempt == attempt]
    assert all(step <= resumed for step in old), names


def assert_superseded_ranks_exited(job: Job, node: str) -> None:
    """Check that the supervisor on a node that SLURM cannot reach has exited with its ranks."""
    until = time.monotonic() + WAIT_S
    while (said := supervisor_events(job, node))[-1] != "made_way":
        assert time.monotonic() < until, said
        time.sleep(0.2)
    while any(is_of_training(pid) for pid in processes(job.number, node)):
        assert time.monotonic() < until
        time.sleep(0.2)


def is_of_training(pid: int) -> bool:
    """Whether a process is a supervisor, launcher, rank or writer, not a part of SLURM or of the script."""
    try:
        return b"dit-scale" in (said := Path(f"/proc/{pid}/cmdline").read_bytes()) or b"dit_scale" in said
    except FileNotFoundError:
        return False


def supervisor_events(job: Job, node: str) -> list[str]:
    """Return the names of the events in its journal."""
    journal = read_journal(Path(job.config.run, "supervisors", f"{node}.jsonl"))
    return [event["event"] for event in journal]


def assert_moved_on(job: Job, victim: str, restarts: int = 1) -> None:
    """Check that the job was requeued, how often, and that it finished on the other nodes."""
    assert job.wait() == ("COMPLETED", 0), job.log
    assert job.restarts() == restarts
    nodes = job.slurm.job(job.number)["NodeList"]
    assert nodes == {"node1": "node[2-3]", "node2": "node[1,3]"}[victim]


def assert_nothing_trains(job: Job, *nodes: str) -> None:
    """Check that no process of the job is left there, even where SLURM could not kill it."""
    until = time.monotonic() + WAIT_S
    while left := [pid for node in nodes for pid in processes(job.number, node)]:
        assert time.monotonic() < until, left
        time.sleep(0.2)
