"""The rendered Job in real pods that lose launchers, pods and nodes, and are evicted, also on slow storage.

    python -m pytest -s tests/chaos/kubernetes_pods.py

`make test` runs a short form, tests/cluster/test_kubernetes_pods.py; this file has no time limit.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dit_scale.elastic.board import Reason
from dit_scale.elastic.node.exits import Exit
from dit_scale.journal import read_journal
from dit_scale.storage import open_storage
from tests.support.cluster.image import build_image
from tests.support.cluster.pods import IndexedJob, Node, network, running
from tests.support.cluster.pods_training import (
    Progress,
    Sizes,
    manifests,
    same_bits,
    steps_taken,
    undisturbed,
    weights,
)
from tests.support.faults.ceph import ceph_s3
from tests.support.faults.slow_upload import slow_upload
from tests.support.latents import write_latents
from tests.support.s3 import BUCKET

pytestmark = pytest.mark.cluster

SLOW_COMMIT_S = 60.0


@pytest.fixture(scope="module")
def image() -> str:
    return build_image()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The shared folder with a data set."""
    write_latents(tmp_path / "runs/latents", 64, 32, 10)
    return tmp_path / "runs"


def launcher(job: IndexedJob, index: int) -> int:
    """Return the deepspeed launcher of a pod as a process of this host."""
    found, left = [], [job.pods[index].pid]
    while left:
        pid = left.pop(0)
        if b"deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            found.append(pid)
        left += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    (one,) = found
    return one


def evict_in_a_step(job: IndexedJob, progress: Progress, index: int) -> float:
    """Evict a pod at the start of a step; return how long it took to save that step and exit."""
    before = steps_taken(job, index)
    job.until(lambda: steps_taken(job, index) > before, "the start of a step")
    taken = steps_taken(job, index)
    code, took_s = job.evict(index)
    assert code == Exit.REQUEUE
    assert progress.step() == taken + 1
    return took_s


def last_commit(folder: Path) -> dict[str, Any]:
    """Return the event of the newest commit in the journal of a run."""
    journal = read_journal(folder / "events.jsonl")
    return [event for event in journal if event["event"] == "checkpoint"][-1]


def tell(took_s: float, commit: dict[str, Any]) -> None:
    print(f"\nSIGTERM to exit: {took_s:.1f} s, including the commit of step {commit['step']}: ", end="")
    print(f"{commit['seconds']:.1f} s")


def test_loss_of_a_launcher_a_pod_and_a_node(tmp_path: Path, image: str, runs: Path) -> None:
    sizes = Sizes(steps=300, every_steps=20)
    objects = manifests(tmp_path / "manifests", image, sizes)
    claims = {"dit-scale-runs": runs}
    with network() as wire, running(objects, Node(tmp_path / "node", wire, claims)) as job:
        progress = Progress(open_storage(runs / "tiny"))
        job.until(lambda: progress.step() > 0, "the first checkpoint")

        os.kill(launcher(job, 0), signal.SIGKILL)
        progress.wait_for_round(job, 2)
        progress.wait_for_checkpoint(job)
        assert not job.ended, "the supervisor restarts the launcher, and no pod fails"

        job.pods[1].signal(signal.SIGKILL)
        progress.wait_for_round(job, 3)
        progress.wait_for_checkpoint(job)

        job.freeze(0)
        job.until(lambda: len(progress.reasons()) == 3, "the end of the round without a node")
        assert len(job.ended) == 1, "the control plane does not know yet that the node is lost"
        job.delete_node(0)
        progress.wait_for_round(job, 4)
        progress.wait_for_checkpoint(job)

        job.until(lambda: job.succeeded == {0, 1}, "the end of the run")
        killed = 128 + signal.SIGKILL
        assert job.ended[:2] == [(1, killed, "Count"), (0, killed, "Ignore")]
        assert sorted(job.ended[2:]) == [(0, Exit.DONE, "Succeeded"), (1, Exit.DONE, "Succeeded")]
        assert progress.reasons() == [Reason.FAILED, Reason.LOST, Reason.LOST, Reason.DONE]
        assert progress.step() == sizes.steps
    expected = undisturbed(tmp_path / "straight", runs / "latents", tmp_path / "manifests")
    assert same_bits(weights(open_storage(runs / "tiny")), expected)


def test_an_evicted_pod_exits_after_a_step_and_the_commit(tmp_path: Path, image: str, runs: Path) -> None:
    sizes = Sizes(steps=8, every_steps=1000, global_batch=128)
    objects = manifests(tmp_path / "manifests", image, sizes)
    claims = {"dit-scale-runs": runs}
    with network() as wire, running(objects, Node(tmp_path / "node", wire, claims)) as job:
        progress = Progress(open_storage(runs / "tiny"))
        job.until(lambda: steps_taken(job, 0) > 0, "the first step")
        took_s = evict_in_a_step(job, progress, 0)
        tell(took_s, last_commit(runs / "tiny"))
        assert progress.wait_for_round(job, 2).committed_step == progress.step()
        job.until(lambda: job.succeeded == {0, 1}, "the end of the run")
    expected = undisturbed(tmp_path / "straight", runs / "latents", tmp_path / "manifests")
    assert same_bits(weights(open_storage(runs / "tiny")), expected)


def test_an_evicted_pod_can_commit_for_a_minute(
    tmp_path: Path, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is on S3 and no folder is shared; the bits equal those of a run in a folder."""
    sizes = Sizes(steps=16, every_steps=8, global_batch=64)
    data, url = f"s3://{BUCKET}/data", f"s3://{BUCKET}/run"
    literals = ("RUN=/runs/tiny", f"DATA_URL={data}", f"CHECKPOINT_URL={url}")
    objects = manifests(tmp_path / "manifests", image, sizes, literals, "checkpoints_on_s3")
    with ceph_s3() as server, slow_upload(server.port) as way, network() as wire:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        write_latents(data, 64, 32, 10)
        endpoint = {"AWS_ENDPOINT_URL": f"http://{wire.gateway}:{way.port}"}
        secrets = {"dit-scale-s3": server.environment | endpoint}
        root = open_storage(url)
        with running(objects, Node(tmp_path / "node", wire, secrets=secrets)) as job:
            progress = Progress(root)
            job.until(lambda: progress.step() > 0, "the first checkpoint")
            largest = max(size for _, size in root.list("checkpoints/"))
            way.bytes_per_s = largest / SLOW_COMMIT_S
            folder = tmp_path / "node" / job.pods[0].name / "runs/tiny"
            took_s = evict_in_a_step(job, progress, 1)
            way.bytes_per_s = float("inf")
            commit = last_commit(folder)
            tell(took_s, commit)
            assert commit["seconds"] > 0.9 * SLOW_COMMIT_S
            assert progress.wait_for_round(job, 2).committed_step == progress.step() == commit["step"]
            job.until(lambda: job.succeeded == {0, 1}, "the end of the run")
        found = weights(root)
    write_latents(tmp_path / "latents", 64, 32, 10)
    expected = undisturbed(tmp_path / "straight", tmp_path / "latents", tmp_path / "manifests")
    assert same_bits(found, expected)
