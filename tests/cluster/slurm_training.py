"""A small training run as a job of the shipped script: what tests submit, follow and compare."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import step_and_attempt
from dit_scale.config import TrainConfig, dump
from dit_scale.train.run import root_of
from tests.cluster.slurm import WAIT_S, Slurm
from tests.dist import jobs
from tests.dist.runs import final_files
from tests.latents import write_latents

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "cluster/slurm_xl2_512.sh"
STEPS = 120
SMALL = ("--nodes=2", "--cpus-per-task=1", "--gpus-per-node=1", "--mem=1G", "--time=30")
"""A request that leaves room for another job on the same nodes; a rank per GPU."""
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "MIN_NODES": "2",  # the bits are the same at the same world size
    "WATCH_S": "3",
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
        """Step and attempt of the newest checkpoint; zeros while there is none."""
        paths = committed(root_of(self.config))
        return step_and_attempt(paths[0]) if paths else (0, 0)

    def wait_for_checkpoint(self, attempt: int = 1, step: int = 1) -> None:
        """Until this attempt, or a later one, has committed this step, or a later one, and is not done."""
        until = time.monotonic() + WAIT_S
        while self.newest()[1] < attempt or self.newest()[0] < step:
            state = self.slurm.job(self.number)["JobState"]
            assert state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.05)
        assert self.newest()[0] < self.config.steps

    def outcome(self) -> tuple[list[jobs.LossRow], list[bytes]]:
        """Loss and gradient norm of every step, and every rank's file of the last checkpoint."""
        return jobs.losses(self.config), final_files(self.config)


def config_of(top: Path, name: str, steps: int = STEPS) -> TrainConfig:
    """A run of two ranks in a folder `name`, of random latents that all runs below `top` share."""
    data = top / "latents"
    if not data.exists():
        write_latents(data, num=40)
    return jobs.saving(jobs.small_config(top / name, data), steps, every_steps=10)


def submit(
    slurm: Slurm, config: TrainConfig, *arguments: str, script: str = SCRIPT, options: tuple[str, ...] = ()
) -> Job:
    """The shipped script, unchanged, with a configuration of its own."""
    run = Path(config.run)
    run.parent.mkdir(exist_ok=True)
    file = run.with_suffix(".yaml")
    file.write_text(dump(config))
    number = slurm.submit(
        script,
        *("--config", str(file), *arguments),
        options=[*SMALL, *options, f"--output={run}-%j.log"],
        cwd=ROOT,
        environment=ENVIRONMENT,
    )
    return Job(slurm, config, number)
