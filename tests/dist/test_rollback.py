"""Failed steps are skipped, repeated failures cause a rollback, and damaged samples are replaced.

The tests train complete runs on data sets with NaN samples or samples damaged on disk. However a run is
interrupted, it produces the bits of an uninterrupted run.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.attempts import AttemptRecord
from dit_scale.checkpoint.manifest import CheckpointId, Manifest
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.data.order import positions_of
from dit_scale.errors import DataError, StabilityError
from dit_scale.train.run_folder import root_of
from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.points import Hold
from tests.support.ranks.processes import TIMEOUT_S, run, start
from tests.support.ranks.rollback_jobs import (
    BATCH,
    NUM,
    STEPS,
    WORLD,
    Fed,
    config_of,
    damage,
    ids_at,
    of_all,
    sample_of,
    spoil,
    train_and_report,
)
from tests.support.ranks.runs import events, final_files, kill, kill_at, wait_for

pytestmark = pytest.mark.dist


def manifest_at_the_end(config: TrainConfig) -> Manifest:
    root = root_of(config)
    return Checkpoint(root, attempts.committed(root)[0]).manifest


def resumed_from(config: TrainConfig) -> list[CheckpointId | None]:
    root = root_of(config)
    return [attempts.read(root, number).resumed_from for number in attempts.numbers(root)]


def assert_same_end(config: TrainConfig, straight: TrainConfig) -> None:
    assert final_files(config) == final_files(straight)
    assert jobs.losses(config) == jobs.losses(straight)
    ends = [manifest_at_the_end(each) for each in (config, straight)]
    assert len({end.model_dump_json(exclude={"attempt", "config"}) for end in ends}) == 1


def test_scattered_bad_samples(tmp_path: Path) -> None:
    data = tmp_path / "latents"
    write_latents(data, num=NUM)
    spoil(data, {sample_of(3, place=6), sample_of(8, place=0)})
    straight = config_of(tmp_path / "straight", data, log_every_steps=4, rollback_after=2)
    assert run(WORLD, jobs.train, straight) == [0, 0]
    noted = events(straight, "skipped_step")
    assert [(event["skipped_step"], event["positions"]) for event in noted] == [
        (3, [[14, 21]]),
        (8, [[49, 56]]),
    ]
    assert [event["sample_ids"] for event in noted] == [
        ids_at(np.arange(14, 21)).tolist(),
        ids_at(np.arange(49, 56)).tolist(),
    ]
    assert [(event["loss"], event["grad_norm"]) for event in noted] == [("nan", "inf")] * 2
    assert manifest_at_the_end(straight).skipped_steps == (3, 8)
    assert manifest_at_the_end(straight).excluded_positions == ()
    lines = [json.loads(line) for line in jobs.losses_so_far(straight)]
    assert [(line["step"], line["skipped"]) for line in lines] == [(4, 1), (8, 1), (12, 0)]

    config = config_of(tmp_path / "killed", data, log_every_steps=4, rollback_after=2)
    kill_at(WORLD, config, tmp_path / "hold", point="before forward", nth=8, victim=1)
    assert run(WORLD, jobs.train, config) == [0, 0]
    assert resumed_from(config)[1] is not None
    assert_same_end(config, straight)


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that makes four steps in a row fail, starting with the fifth."""
    data = tmp_path_factory.mktemp("failing")
    write_latents(data, num=NUM)
    spoil(data, {sample_of(step, place) for step, place in ((5, 2), (6, 6), (7, 0), (8, 3))})
    return data


def failing_config(folder: Path, data: Path) -> TrainConfig:
    """Two failures in a row are too many, but the run notices at step 8. A save is due at step 6."""
    return config_of(folder, data, log_every_steps=4, rollback_after=2)


@pytest.fixture(scope="module")
def rolled_back(failing: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Fed]:
    """An undisturbed run, and the samples that it read."""
    config = failing_config(tmp_path_factory.mktemp("straight"), failing)
    return config, of_all(run(WORLD, train_and_report, config))


def test_steps_that_keep_failing_are_rolled_back(rolled_back: tuple[TrainConfig, Fed]) -> None:
    config, fed = rolled_back
    excluded = ((4 * BATCH, 8 * BATCH),)
    for step in range(1, STEPS + 1):
        positions = positions_of(np.arange((step - 1) * BATCH, step * BATCH), excluded)
        labels = ids_at(positions) % 10
        assert fed[step] == list(zip(positions.tolist(), labels.tolist(), strict=True))
    (rollback,) = events(config, "rollback")
    assert (rollback["attempt"], rollback["failed_steps"]) == (1, [5, 8])
    assert rollback["excluded_positions"] == [list(*excluded)]
    saved = [event["name"] for event in events(config, "checkpoint") if event["attempt"] == 1]
    assert saved == ["0000000003-0001"]
    end = manifest_at_the_end(config)
    assert (end.attempt, end.skipped_steps, end.excluded_positions) == (2, (), excluded)
    assert resumed_from(config) == [None, CheckpointId(3, 1)]
    assert [row["step"] for row in jobs.losses(config)] == [4, 8, 12]


def test_killed_right_after_a_rollback(
    failing: Path, rolled_back: tuple[TrainConfig, Fed], tmp_path: Path
) -> None:
    config = failing_config(tmp_path / "run", failing)
    kill_at(WORLD, config, tmp_path / "hold", point="after the claim", nth=2, victim=0)
    assert run(WORLD, jobs.train, config) == [0, 0]
    assert resumed_from(config) == [None, *[CheckpointId(3, 1)] * 2]
    assert len(events(config, "rollback")) == 1
    assert_same_end(config, rolled_back[0])


def test_a_stale_process_cannot_roll_back(
    failing: Path, rolled_back: tuple[TrainConfig, Fed], tmp_path: Path
) -> None:
    config = failing_config(tmp_path / "run", failing)
    hold = Hold(tmp_path, "before the claim", 2)
    old, answers = start(WORLD, jobs.train_held, config, hold, 0)
    try:
        wait_for(hold, answers)
        assert run(WORLD, jobs.train, config) == [0, 0]
        hold.go.touch()
        errors = [answers.get(timeout=TIMEOUT_S)[1] for _ in range(WORLD)]
    finally:
        kill(old)
    assert all("SupersededError" in error and "just started attempt 2" in error for error in errors)
    assert resumed_from(config) == [None, *[CheckpointId(3, 1)] * 2]
    assert_same_end(config, rolled_back[0])


def test_rollback_uses_a_checkpoint_of_the_step_before_the_failure(tmp_path: Path) -> None:
    data = tmp_path / "latents"
    write_latents(data, num=NUM)
    spoil(data, {sample_of(step, place=step) for step in (4, 5)})
    config = config_of(tmp_path / "run", data, rollback_after=2)
    assert run(1, jobs.train, config) == [0]
    (rollback,) = events(config, "rollback")
    assert rollback["failed_steps"] == [4, 5]
    assert resumed_from(config) == [None, CheckpointId(3, 1)]


def test_a_rollback_before_the_first_checkpoint_restarts_from_step_0(tmp_path: Path) -> None:
    data = tmp_path / "latents"
    write_latents(data, num=NUM)
    spoil(data, {sample_of(step, place=step) for step in (2, 3)})
    config = config_of(tmp_path / "run", data, rollback_after=2)
    fed = of_all(run(WORLD, train_and_report, config))
    first, second = range(7), range(21, 28)
    assert [[position for position, _ in fed[step]] for step in (1, 2)] == [list(first), list(second)]
    assert resumed_from(config) == [None, None]
    assert manifest_at_the_end(config).excluded_positions == ((7, 21),)
    assert [row["step"] for row in jobs.losses(config)] == list(range(1, STEPS + 1))

    # The rollback left nothing of the first steps in moments, averages and AdamW's step count: a fresh
    # run that excludes the same samples produces the same bits.
    fresh = config.model_copy(update={"run": str(tmp_path / "fresh")})
    attempts.claim(root_of(fresh), AttemptRecord(1, None, ((7, 21),)))
    assert run(WORLD, jobs.train, fresh) == [0, 0]
    assert_same_end(config, fresh)


def test_a_run_gives_up_if_rollbacks_do_not_help(tmp_path: Path) -> None:
    data = tmp_path / "latents"
    write_latents(data, num=NUM)
    spoil(data, range(NUM))
    config = config_of(tmp_path / "run", data, rollback_after=2, max_rollbacks=2)
    with pytest.raises(AssertionError, match=StabilityError.__name__) as failure:
        run(WORLD, jobs.train, config)
    assert "2 steps in a row failed, starting at step 1, after 2 rollbacks; lower optimizer.lr" in str(
        failure.value
    )
    assert [event["excluded_positions"] for event in events(config, "rollback")] == [[[0, 14]], [[0, 28]]]
    assert resumed_from(config) == [None] * 3


def test_a_damaged_sample_is_replaced(tmp_path: Path) -> None:
    data, bad = tmp_path / "latents", sample_of(4, place=6)
    write_latents(data, num=NUM)
    spoil(data, {sample_of(4, place=0)})
    whole = config_of(tmp_path / "whole", data, log_every_steps=6)
    wanted = of_all(run(WORLD, train_and_report, whole))
    wanted[4][6] = (27, (bad + 1) % 10)

    damage(data, bad)
    two, one, killed = (
        config_of(tmp_path / name, data, log_every_steps=6, damaged="quarantine")
        for name in ("two", "one", "killed")
    )
    for config, world in ((two, 2), (one, 1)):
        assert of_all(run(world, train_and_report, config)) == wanted
        (event,) = events(config, "quarantined")
        assert event["sample_id"] == bad
        assert manifest_at_the_end(config).quarantined == {bad: event["reason"]}
        assert "shard" in event["reason"]
        assert f"sample {bad}" in event["reason"]
        (skipped,) = events(config, "skipped_step")
        assert skipped["sample_ids"] == [*ids_at(np.arange(21, 27)).tolist(), bad + 1]
    for row, other in zip(jobs.losses(two), jobs.losses(one), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)

    kill_at(WORLD, killed, tmp_path / "hold", point="before forward", nth=9, victim=0)
    assert run(WORLD, jobs.train, killed) == [0, 0]
    assert resumed_from(killed)[1] is not None
    assert_same_end(killed, two)

    stopping = config_of(tmp_path / "stopping", data)
    with pytest.raises(AssertionError, match=DataError.__name__) as failure:
        run(1, jobs.train, stopping)
    assert f"sample {bad}: expected CRC-32C" in str(failure.value)
    assert "set data.damaged=quarantine to replace the sample" in str(failure.value)
