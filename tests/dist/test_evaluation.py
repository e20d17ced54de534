"""Evaluations while training: they change no bit of the run, and every evaluated step has one result."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.partition import MASTER
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.data.held_out import held_out_mask
from dit_scale.data.shards import LatentDataset
from dit_scale.diffusion import schedule as schedules
from dit_scale.models import dit
from dit_scale.train import evaluation
from dit_scale.train.attempt import Attempt
from dit_scale.train.evaluation_images import Painter
from dit_scale.train.evaluation_loss import HeldOutLoss, means
from dit_scale.train.logbook import Logbook
from dit_scale.train.run_folder import evaluation_grid, root_of
from tests.support.evaluated_run import CLASSIFIER, write_ground
from tests.support.ranks import jobs, record
from tests.support.ranks.points import Hold, after, before
from tests.support.ranks.processes import TIMEOUT_S, run, start
from tests.support.ranks.runs import events, final_files, kill, wait_for

pytestmark = pytest.mark.dist

WORLD, STEPS, EVERY = 2, 9, 3
PROFILES = ("constant", "power")
Ground = dict[str, str]

POINTS: dict[str, Callable[[Hold], AbstractContextManager[Any]]] = {
    "gathering weights": before(evaluation, "gather_weights"),
    "sampling": before(Painter, "paint"),
    "after the grid": after(evaluation, "write_grid"),
    "held-out loss": before(HeldOutLoss, "tile_sums"),
    "before the row": before(Attempt, "evaluated"),
    "between row and event": before(Logbook, "picture"),
    "after the evaluation": after(Attempt, "evaluated"),
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return write_ground(tmp_path_factory.mktemp("ground"))


def config_of(
    folder: Path, ground: Ground, *, every_steps: int = EVERY, stage: int = 2, **more: Any
) -> TrainConfig:
    """Configure a run that evaluates everything every third step."""
    base = jobs.small_config(folder, Path(ground["url"]), zero_stage=stage)
    evaluate = {
        "every_steps": every_steps,
        "held_out": 0.2,
        "grid_images": 5,
        "images": 6,
        "network": f"classifier:{CLASSIFIER}",
        "reference": ground["reference"],
        "sampling_steps": 3,
        "tile": 4,
        **more,
    }
    tree = base.model_dump(mode="json") | {"evaluate": evaluate, "steps": STEPS}
    tree["data"] |= {"vae": ground["vae"]}
    tree["checkpoint"] |= {"every_steps": EVERY}
    return TrainConfig.model_validate(tree)


def train_held_in(config: TrainConfig, hold: Hold, victim: int) -> int:
    """Train as one rank, paced; rank `victim` is held at a point of its evaluation."""
    if int(os.environ["RANK"]) != victim:
        with jobs.paced():
            return jobs.train(config)
    with jobs.paced(), POINTS[hold.point](hold):
        return jobs.train(config)


def evaluations(config: TrainConfig) -> list[dict[str, Any]]:
    """Return the rows of evaluations in the record."""
    rows = (json.loads(line) for line in jobs.losses_so_far(config))
    return [row for row in rows if "eval_frechet" in row]


def steps_of_rows(config: TrainConfig) -> list[int]:
    return [row["step"] for row in evaluations(config)]


@pytest.fixture(scope="module", params=[2, 3], ids=["stage2", "stage3"])
def evaluated(
    request: pytest.FixtureRequest, ground: Ground, tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    """An undisturbed run that evaluates."""
    config = config_of(tmp_path_factory.mktemp("evaluated"), ground, stage=request.param)
    assert run(WORLD, jobs.train, config) == [0] * WORLD
    return config


def like(config: TrainConfig, folder: Path, **evaluate: Any) -> TrainConfig:
    changed = config.evaluate.model_copy(update=evaluate)
    return config.model_copy(update={"run": str(folder), "evaluate": changed})


def test_a_run_ends_with_the_same_bits_without_evaluations(evaluated: TrainConfig, tmp_path: Path) -> None:
    plain = like(evaluated, tmp_path, every_steps=0)
    assert run(WORLD, jobs.train, plain) == [0] * WORLD
    assert final_files(plain) == final_files(evaluated)
    assert [row for row in record.rows(evaluated) if "loss" in row] == record.rows(plain)
    assert steps_of_rows(evaluated) == [0, 3, 6, 9]
    assert steps_of_rows(plain) == []
    for step in (0, 3, 6, 9):
        for profile in PROFILES:
            assert evaluation_grid(evaluated, step, profile).is_file()


def test_a_run_killed_in_its_evaluations_ends_with_the_same_bits(
    evaluated: TrainConfig, tmp_path: Path
) -> None:
    config = like(evaluated, tmp_path / "run")
    # Passes are counted since the start. From step 0, the third evaluation comes after the first checkpoint.
    kills = [("sampling", 1, 1), ("between row and event", 3, 0), ("gathering weights", 7, 1)]
    # Resumed at step 3, which was evaluated before it was saved.
    kills += [("after the grid", 1, 0), ("held-out loss", 2, 1), ("before the row", 1, 1)]
    kills += [("after the evaluation", 1, 0)]
    if evaluated.engine.zero_stage == 3:
        kills = kills[2:5:2]
    for number, (point, nth, victim) in enumerate(kills):
        (tmp_path / str(number)).mkdir()
        hold = Hold(tmp_path / str(number), point, nth)
        ranks, answers = start(WORLD, train_held_in, config, hold, victim)
        try:
            wait_for(hold, answers)
        finally:
            kill((ranks[victim], *ranks))
    assert run(WORLD, jobs.train, config) == [0] * WORLD
    assert final_files(config) == final_files(evaluated)
    assert evaluations(config) == evaluations(evaluated)
    for step in (0, 3, 6, 9):
        for profile in PROFILES:
            expected = evaluation_grid(evaluated, step, profile).read_bytes()
            assert evaluation_grid(config, step, profile).read_bytes() == expected
    resumed = [event["resumed_from"] for event in events(config, "start")]
    print(f"resumed from {resumed}")
    assert any(resumed)


def test_a_stop_during_an_evaluation_is_heard_and_the_evaluation_made_up(
    evaluated: TrainConfig, tmp_path: Path
) -> None:
    config = like(evaluated, tmp_path / "run")
    hold = Hold(tmp_path, "held-out loss", 8)  # in the evaluation of a later step
    ranks, answers = start(WORLD, train_held_in, config, hold, 1)
    wait_for(hold, answers)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGTERM)
    hold.go.touch()
    assert [answers.get(timeout=TIMEOUT_S)[1:] for _ in range(WORLD)] == [(None, 75)] * WORLD
    for process in ranks:
        process.join()
    stopped = committed(root_of(config))[0].step
    assert stopped in (3, 6)
    assert steps_of_rows(config)[-1] == stopped - EVERY
    assert run(WORLD, jobs.train, config) == [0] * WORLD
    assert final_files(config) == final_files(evaluated)
    assert evaluations(config) == evaluations(evaluated)


def test_the_losses_are_those_of_the_checkpoints_weights(evaluated: TrainConfig) -> None:
    """One process computes them again, from the masters and averages that the run has saved."""
    root = root_of(evaluated)
    checkpoint = Checkpoint(root, committed(root)[0])
    row = evaluations(evaluated)[-1]
    mask = held_out_mask(40, 0.2, 0)
    assert mask is not None
    held_out = HeldOutLoss(
        dataset=LatentDataset.open(evaluated.data.url),
        ids=np.flatnonzero(mask),
        schedule=schedules.linear(evaluated.diffusion.timesteps),
        seed=0,
        tile=evaluated.evaluate.tile,
        skip_damaged=False,
    )
    found = {}
    for kind, name in ((MASTER, "raw"), ("ema.constant", "ema.constant"), ("ema.power", "ema.power")):
        model = dit.build(evaluated.model, 0, initialise=False)
        model.load_state_dict({**model.state_dict(), **checkpoint.read_whole(kind)})
        for column, value in means([held_out.tile_sums(model, n) for n in range(held_out.tiles)]).items():
            found[f"eval_{column}_{name}"] = value
    print({name: (row[name], value) for name, value in found.items()})
    for name, value in found.items():
        assert row[name] == pytest.approx(value, rel=1e-6)
    assert row["eval_loss_raw"] != row["eval_loss_ema.constant"] != row["eval_loss_ema.power"]


def test_results_do_not_depend_on_the_world_size(ground: Ground, tmp_path: Path) -> None:
    rows = []
    for world, stage in ((1, 2), (2, 2), (3, 2), (2, 3)):
        config = config_of(tmp_path / f"{world}-{stage}", ground, stage=stage, every_steps=10)
        config = config.model_copy(update={"steps": 1})
        assert run(world, jobs.train, config, True) == [0] * world
        rows.append(evaluations(config)[0])
    assert rows[0]["step"] == 0
    assert rows[0]["eval_loss_raw"] > 0
    print(rows)
    for row in rows:
        assert row == pytest.approx(rows[0], rel=1e-6)


def test_the_best_checkpoint_is_kept(ground: Ground, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", ground, images=0)
    checkpoint = config.checkpoint.model_copy(update={"keep": 1, "keep_best": True, "every_steps": 100})
    optimizer = config.optimizer.model_copy(update={"lr": 0.05})  # diverges, so that an early step is best
    config = config.model_copy(update={"checkpoint": checkpoint, "optimizer": optimizer, "steps": 12})
    for steps in (7, 12):  # restarted in between
        assert run(WORLD, jobs.train, config.model_copy(update={"steps": steps})) == [0] * WORLD
    rows = [json.loads(line) for line in jobs.losses_so_far(config)]
    values = {row["step"]: row["eval_loss_ema.constant"] for row in rows if "eval_loss_raw" in row}
    print(values)
    assert list(values) == [0, 3, 6, 7, 9, 12]
    best = min((step for step in values if step), key=lambda step: values[step])
    assert {one.step for one in committed(root_of(config))} == {best, 12}
