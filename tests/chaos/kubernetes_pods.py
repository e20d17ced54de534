"""The rendered Job in real pods: a run that loses a launcher, a pod and a node ends as if it had not."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import step_and_attempt
from dit_scale.checkpoint.partition import MASTER
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig, load
from dit_scale.elastic.board import Board, Reason
from dit_scale.elastic.exits import Exit
from dit_scale.storage import open_storage
from tests.cluster.kustomize import OVERLAYS, render
from tests.cluster.pods import IndexedJob, Node, build_image, running
from tests.dist import jobs
from tests.dist.processes import run
from tests.latents import write_latents

pytestmark = pytest.mark.cluster

STEPS = 300
EVERY_STEPS = 20
CONFIG = f"""
steps: {STEPS}
global_batch: 4
model: {{name: DiT-Ti/2, image_size: 32, num_classes: 10, attention: sdpa}}
engine: {{zero_stage: 2, precision: bf16, micro_batch: 2, device: cpu, determinism: strict}}
checkpoint: {{every_steps: {EVERY_STEPS}}}
log: {{every_steps: 10}}
"""
OVERLAY = """
resources: [{overlay}]
images:
  - {{name: dit-scale, newName: {name}, newTag: {tag}}}
configMapGenerator:
  - name: dit-scale
    behavior: merge
    literals: [CONFIG=/configs/tiny.yaml, NODES=2, RUN=/runs/tiny, DATA_URL=/runs/latents]
  - {{name: dit-scale-configs, behavior: merge, files: [tiny.yaml]}}
patches:
  - target: {{kind: Job}}
    patch: |-
      - {{op: replace, path: /spec/completions, value: 2}}
      - {{op: replace, path: /spec/parallelism, value: 2}}
      - {{op: remove, path: /spec/template/spec/containers/0/resources}}
      - {{op: add, path: /spec/template/spec/containers/0/args/-, value: --lease-s=30}}
"""


def objects(folder: Path, image: str) -> list[dict[str, Any]]:
    """What an overlay of a small run on two CPU nodes makes of the shipped one."""
    name, _, tag = image.rpartition(":")
    (folder / "tiny.yaml").write_text(CONFIG)
    overlay = os.path.relpath(OVERLAYS / "xl2_256", folder)
    (folder / "kustomization.yaml").write_text(OVERLAY.format(overlay=overlay, name=name, tag=tag))
    return render(folder)


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    root = open_storage(config.run)
    return Checkpoint(root, committed(root)[0]).read_whole(MASTER)


def launchers(job: IndexedJob, index: int) -> list[int]:
    """The processes of the deepspeed launcher in a pod, as this host knows them, outermost first."""
    found, left = [], [job.pods[index].pid()]
    while left:
        pid = left.pop(0)
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(word.endswith(b"bin/deepspeed") for word in command):
            found.append(pid)
        left += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


class Progress:
    """What the storage of a run says of it."""

    def __init__(self, folder: Path) -> None:
        self._root = open_storage(folder)
        self.board = Board(self._root)

    def step(self) -> int:
        """Of the newest checkpoint; -1 when there is none."""
        names = committed(self._root)
        return step_and_attempt(names[0])[0] if names else -1

    def reasons(self) -> list[Reason]:
        endings = (self.board.ending(number) for number in range(1, self.board.newest() + 1))
        return [ending.reason for ending in endings if ending is not None]

    def wait_for_checkpoint(self, job: IndexedJob) -> None:
        """A newer one than there is now."""
        before = self.step()
        job.until(lambda: self.step() > before, f"a checkpoint after step {before}")


@pytest.fixture(scope="module")
def image() -> str:
    return build_image()


def test_a_launcher_a_pod_and_a_node_are_lost(tmp_path: Path, image: str) -> None:
    runs = tmp_path / "runs"
    write_latents(runs / "latents", 64, 32, 10)
    runs.chmod(0o777)
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    with running(objects(manifests, image), Node(tmp_path / "node", {"dit-scale-runs": runs})) as job:
        progress = Progress(runs / "tiny")
        job.until(lambda: progress.step() > 0, "the first checkpoint")

        os.kill(launchers(job, 0)[0], signal.SIGKILL)
        job.until(lambda: len(progress.reasons()) == 1, "the end of the round without a launcher")
        progress.wait_for_checkpoint(job)
        assert not job.ended, "the supervisor starts the launcher again, no pod ends"

        job.pods[1].kill()
        job.until(lambda: len(job.ended) == 1, "the end of the killed pod")
        progress.wait_for_checkpoint(job)

        assert job.evict(0) == Exit.REQUEUE
        saved = progress.step()
        newest = progress.board.sealed(progress.board.newest())
        assert newest is not None
        assert saved > newest.committed_step
        job.until(lambda: progress.board.newest() > newest.number, "the next round")
        after = progress.board.sealed(progress.board.newest())
        assert after is not None
        assert after.committed_step == saved

        job.until(lambda: job.succeeded == {0, 1}, "the end of the run")
        killed = 128 + signal.SIGKILL
        assert job.ended[:2] == [(1, killed, "Count"), (0, Exit.REQUEUE, "Ignore")]
        assert sorted(job.ended[2:]) == [(0, Exit.DONE, "Succeeded"), (1, Exit.DONE, "Succeeded")]
        assert progress.reasons() == [Reason.FAILED, Reason.LOST, Reason.LEAVING, Reason.DONE]
        assert progress.step() == STEPS

    overrides = [f"run={tmp_path / 'straight'}", f"data.url={runs / 'latents'}"]
    straight = load(TrainConfig, str(manifests / "tiny.yaml"), overrides)
    assert run(2, jobs.train, straight) == [0, 0]
    moved = straight.model_copy(update={"run": str(runs / "tiny")})
    expected, found = weights(straight), weights(moved)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
