"""A small training run as the shipped Job in real pods: tests start, follow and compare it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.partition import MASTER
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig, load
from dit_scale.elastic.board import Board, Reason, Round
from dit_scale.heartbeat import read_beat
from dit_scale.storage import Storage, open_storage
from tests.support.cluster.image import WAIT_S
from tests.support.cluster.kustomize import KUBERNETES, render
from tests.support.cluster.pods import IndexedJob
from tests.support.ranks import jobs
from tests.support.ranks.processes import run

CONFIG = """
steps: {steps}
global_batch: {global_batch}
model: {{name: DiT-Ti/2, image_size: 32, num_classes: 10, attention: sdpa}}
engine: {{zero_stage: 2, precision: fp32, micro_batch: 2, device: cpu, determinism: strict}}
checkpoint: {{every_steps: {every_steps}}}
log: {{every_steps: 10}}
"""
OVERLAY = """
resources: [{kubernetes}/overlays/xl2_256]
components: [{components}]
images:
  - {{name: dit-scale, newName: {name}, newTag: {tag}}}
configMapGenerator:
  - name: dit-scale
    behavior: merge
    literals: [CONFIG=/configs/tiny.yaml, NODES=2, {literals}]
  - {{name: dit-scale-configs, behavior: merge, files: [tiny.yaml]}}
patches:
  - target: {{kind: Job}}
    patch: |-
      - {{op: replace, path: /spec/completions, value: 2}}
      - {{op: replace, path: /spec/parallelism, value: 2}}
      - {{op: remove, path: /spec/template/spec/containers/0/resources}}
      - {{op: add, path: /spec/template/spec/containers/0/args/-, value: --lease-s=30}}
"""
ON_VOLUME = ("RUN=/runs/tiny", "DATA_URL=/runs/latents")


@dataclass(frozen=True)
class Sizes:
    """The size of a run."""

    steps: int
    every_steps: int
    """Steps between two checkpoints."""
    global_batch: int = 4


def manifests(
    folder: Path, image: str, sizes: Sizes, literals: tuple[str, ...] = ON_VOLUME, component: str = ""
) -> list[dict[str, Any]]:
    """Render an overlay that turns the shipped one into a small run on two CPU nodes."""
    folder.mkdir()
    (folder / "tiny.yaml").write_text(CONFIG.format(**vars(sizes)))
    name, _, tag = image.rpartition(":")
    kubernetes = os.path.relpath(KUBERNETES, folder)
    components = f"{kubernetes}/components/{component}" if component else ""
    text = OVERLAY.format(
        kubernetes=kubernetes, components=components, name=name, tag=tag, literals=", ".join(literals)
    )
    (folder / "kustomization.yaml").write_text(text)
    return render(folder)


class Progress:
    """The progress of a run, read from its storage."""

    def __init__(self, root: Storage) -> None:
        self._root = root
        self.board = Board(self._root)

    def step(self) -> int:
        """Return the step of the newest checkpoint; -1 when there is none."""
        ids = committed(self._root)
        return ids[0].step if ids else -1

    def reasons(self) -> list[Reason]:
        endings = (self.board.ending(number) for number in range(1, self.board.newest() + 1))
        return [ending.reason for ending in endings if ending is not None]

    def wait_for_checkpoint(self, job: IndexedJob) -> None:
        """Wait for a checkpoint newer than the current one."""
        before = self.step()
        job.until(lambda: self.step() > before, f"a checkpoint after step {before}")

    def wait_for_round(self, job: IndexedJob, number: int) -> Round:
        """Wait for the round with this number and return it as sealed."""
        job.until(lambda: self.board.newest() >= number, f"round {number}")
        sealed = self.board.sealed(number)
        assert sealed is not None
        return sealed


def steps_taken(job: IndexedJob, index: int) -> int:
    """Return the step in the heartbeats of a pod's rank in the newest round; -1 before the first."""
    tmp = job.node.folder / job.pods[index].name / "tmp"
    beats = max(tmp.glob("dit-scale-*/round-*/beat-*"), key=lambda path: path.parent.name, default=None)
    beat = read_beat(beats) if beats is not None else None
    return beat.step if beat is not None else -1


def weights(root: Storage) -> dict[str, torch.Tensor]:
    """Return the weights of the newest checkpoint."""
    return Checkpoint(root, committed(root)[0]).read_whole(MASTER)


def undisturbed(folder: Path, data: Path, manifests: Path) -> dict[str, torch.Tensor]:
    """Return the weights of an undisturbed run with the same configuration, in two processes of this host."""
    config = load(TrainConfig, str(manifests / "tiny.yaml"), [f"run={folder}", f"data.url={data}"])
    assert run(2, jobs.train, config, timeout_s=WAIT_S) == [0, 0]
    return weights(open_storage(folder))


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(expected[name], found[name]) for name in expected
    )
