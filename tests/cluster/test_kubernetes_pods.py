"""The rendered Job in real pods: a run with one lost and one evicted pod matches an undisturbed run."""

import signal
from pathlib import Path

import pytest

from dit_scale.elastic.board import Reason
from dit_scale.elastic.node.exits import Exit
from dit_scale.storage import open_storage
from tests.support.cluster.image import build_image
from tests.support.cluster.pods import Node, network, running
from tests.support.cluster.pods_training import (
    Progress,
    Sizes,
    manifests,
    same_bits,
    steps_taken,
    undisturbed,
    weights,
)
from tests.support.latents import write_latents

pytestmark = pytest.mark.cluster

SIZES = Sizes(steps=100, every_steps=10)


def test_killed_and_evicted_pods_are_replaced(tmp_path: Path) -> None:
    objects = manifests(tmp_path / "manifests", build_image(), SIZES)
    runs = tmp_path / "runs"
    write_latents(runs / "latents", 64, 32, 10)
    claims = {"dit-scale-runs": runs}
    with network() as wire, running(objects, Node(tmp_path / "node", wire, claims)) as job:
        progress = Progress(open_storage(runs / "tiny"))
        job.until(lambda: min(steps_taken(job, index) for index in (0, 1)) >= 0, "the start of the ranks")

        job.pods[1].signal(signal.SIGKILL)
        begun = progress.wait_for_round(job, 2)
        progress.wait_for_checkpoint(job)

        assert job.evict(0)[0] == Exit.REQUEUE
        saved = progress.step()
        assert saved > begun.committed_step
        assert progress.wait_for_round(job, 3).committed_step == saved

        job.until(lambda: job.succeeded == {0, 1}, "the end of the run")
        killed = 128 + signal.SIGKILL
        assert job.ended[:2] == [(1, killed, "Count"), (0, Exit.REQUEUE, "Ignore")]
        assert sorted(job.ended[2:]) == [(0, Exit.DONE, "Succeeded"), (1, Exit.DONE, "Succeeded")]
        assert progress.reasons() == [Reason.LOST, Reason.LEAVING, Reason.DONE]
        assert progress.step() == SIZES.steps
    expected = undisturbed(tmp_path / "straight", runs / "latents", tmp_path / "manifests")
    assert same_bits(weights(open_storage(runs / "tiny")), expected)
