"""The best checkpoint: which one it is, and that retention keeps it."""

import pytest
import torch

from dit_scale.checkpoint import retention
from dit_scale.checkpoint.attempts import AttemptRecord, claim, committed
from dit_scale.checkpoint.manifest import MANIFEST, CheckpointId, Evaluated, Manifest, read_manifest
from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.checkpoint.retention import Rule
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.storage import Storage
from tests.support import checkpoints

RANKS = [[Partition({MASTER: torch.arange(4).float()}, (ParameterSlice("w", 0, 4, 0),))]]


def put(
    root: Storage,
    step: int,
    value: float | None,
    attempt: int = 1,
    measure: str = "loss",
    at: int | None = None,
) -> Manifest:
    """Write a checkpoint that was evaluated at its step, or at step `at`."""
    evaluated = {"step": step if at is None else at, "measure": measure, "value": value}
    return checkpoints.write(root, CheckpointId(step, attempt), RANKS, evaluated=evaluated)


def steps(root: Storage) -> list[int]:
    return [checkpoint_id.step for checkpoint_id in committed(root)]


def test_the_best_is_kept_however_old_it_is(root: Storage) -> None:
    for step, value in ((1, 5.0), (2, 3.0), (3, 4.0), (4, 3.5), (5, 2.0), (6, 6.0), (7, 7.0)):
        put(root, step, value)
        retention.prune(root, 1, CheckpointId(step, 1), Rule(1, best=True))
        if step == 4:
            assert steps(root) == [4, 2]
    assert steps(root) == [7, 5]


def test_without_the_rule_it_is_not_kept(root: Storage) -> None:
    for step, value in ((1, 1.0), (2, 3.0)):
        put(root, step, value)
    retention.prune(root, 1, CheckpointId(2, 1), Rule(1))
    assert steps(root) == [2]


def test_of_equal_values_the_earliest_is_best(root: Storage) -> None:
    manifests = [put(root, step, value) for step, value in ((3, 1.0), (1, 2.0), (2, 1.0))]
    best = retention.best(manifests)
    assert best is not None
    assert best.step == 2


@pytest.mark.parametrize(
    "other",
    [
        {"value": None},
        {"value": 0.5, "measure": "distance"},
        {"value": 0.5, "at": 1},
        {"value": 0.5, "measure": ""},
    ],
    ids=["no number", "another measure", "evaluated earlier", "no measure"],
)
def test_what_cannot_be_compared_does_not_count(root: Storage, other: dict[str, object]) -> None:
    manifests = [put(root, 2, **other), put(root, 3, 1.0)]  # type: ignore[arg-type]
    best = retention.best(manifests)
    assert best is not None
    assert best.step == 3


def test_there_is_no_best_without_evaluations(root: Storage) -> None:
    assert retention.best([checkpoints.write(root, CheckpointId(1, 1), RANKS)]) is None


def test_checkpoints_that_a_later_attempt_left_behind_do_not_count(root: Storage) -> None:
    claim(root, AttemptRecord(1))
    for step, value in ((1, 5.0), (2, 1.0)):
        put(root, step, value)
    claim(root, AttemptRecord(2, CheckpointId(1, 1)))
    put(root, 3, 6.0, attempt=2)
    retention.prune(root, 2, CheckpointId(3, 2), Rule(1, best=True))
    assert steps(root) == [3, 1]


def test_a_manifest_without_an_evaluation_has_no_such_key(root: Storage) -> None:
    checkpoints.write(root, CheckpointId(1, 1), RANKS)
    put(root, 2, 0.1 + 0.2)
    assert b"evaluated" not in root.read(f"{CheckpointId(1, 1).path()}/{MANIFEST}")
    assert read_manifest(root, CheckpointId(1, 1)).evaluated is None
    evaluated = read_manifest(root, CheckpointId(2, 1)).evaluated
    assert evaluated == Evaluated(step=2, measure="loss", value=0.1 + 0.2)
