"""A run that is killed anywhere and resumed produces the bits of an undisturbed run.

Every kill is a SIGKILL from outside, sent to one rank while the rank or its writer is held at a named point.
The other ranks are killed next, as a launcher would do. One run is killed at all points of a list in turn.
"""

from pathlib import Path

import pytest

from dit_scale.config import TrainConfig
from tests.support.ranks import jobs
from tests.support.ranks.points import RANK_POINTS, WRITER_POINTS
from tests.support.ranks.processes import run
from tests.support.ranks.record import rows
from tests.support.ranks.runs import events, final_files, kill_at

pytestmark = pytest.mark.dist

WORLD = 2

# point, its n-th pass since the start, rank. A save is due every three steps; two checkpoints are kept.
IN_THE_STEP = [
    ("before forward", 5, 1),
    ("inside backward", 5, 0),
    ("inside the reduce", 20, 1),
    ("between optimizer and EMA", 5, 0),
    ("after the step", 5, 1),
    ("inside a line of the record", 5, 0),
    ("inside the snapshot", 2, 1),
    ("after the snapshot", 2, 0),
    ("before the commit", 2, 0),
]
IN_THE_WRITER = [
    ("writer: before the file", 2, 1),
    ("writer: inside the file", 3, 0),
    ("writer: before its name", 2, 1),
    ("writer: before reading again", 2, 0),
    ("writer: before the manifest", 2, 0),
    ("writer: after the fencing check", 3, 0),
    ("writer: manifest without its name", 2, 0),
    ("writer: after the manifest", 2, 0),
    ("writer: in retention", 1, 0),
    ("writer: inside retention", 2, 0),
]
AT_THE_START = [
    ("after the step", 14, 0),
    ("restoring", 20, 1),
    ("before the claim", 1, 0),
    ("after the claim", 1, 0),
    ("before its files", 1, 0),
    ("after the fencing check", 1, 0),
    ("starting its record", 1, 0),
    ("before its own config", 2, 0),
    ("before its names", 1, 0),
    ("setting a name", 4, 0),
    ("after its files", 1, 0),
]
THREE = [("inside the reduce", 20, 0), ("between optimizer and EMA", 5, 1), ("writer: inside the file", 3, 0)]


def config_of(folder: Path, data: Path, stage: int, steps: int) -> TrainConfig:
    config = jobs.small_config(folder, data, zero_stage=stage)
    return jobs.saving(config, steps=steps, every_steps=3, ema_every_steps=6)


@pytest.mark.parametrize(
    ("stage", "kills"),
    [(2, IN_THE_STEP), (2, IN_THE_WRITER), (2, AT_THE_START), (1, THREE), (3, THREE)],
    ids=["stage 2, the step", "stage 2, the writer", "stage 2, the start", "stage 1", "stage 3"],
)
def test_killed_and_resumed_gives_the_same_bits(
    data: Path, tmp_path: Path, stage: int, kills: list[tuple[str, int, int]]
) -> None:
    steps = 6 * len(kills) + 6
    straight = config_of(tmp_path / "straight", data, stage, steps)
    assert run(WORLD, jobs.train, straight) == [0] * WORLD
    config = config_of(tmp_path / "killed", data, stage, steps)
    for number, (point, nth, victim) in enumerate(kills):
        kill_at(WORLD, config, tmp_path / f"hold{number}", point=point, nth=nth, victim=victim)
    assert run(WORLD, jobs.train, config) == [0] * WORLD
    assert final_files(config) == final_files(straight)
    assert rows(config) == rows(straight)
    print(f"ZeRO-{stage}: killed at {len(kills)} points, resumed from", end=" ")
    print([event["resumed_from"] for event in events(config, "start")])


def test_a_log_point_after_a_kill_counts_the_steps_before_it(data: Path, tmp_path: Path) -> None:
    """Saves fall between log points, so the checkpoint carries what the steps since the last one measured."""
    straight = config_of(tmp_path / "straight", data, stage=2, steps=14)
    straight = straight.model_copy(update={"log": straight.log.model_copy(update={"every_steps": 7})})
    assert run(WORLD, jobs.train, straight) == [0] * WORLD
    config = straight.model_copy(update={"run": str(tmp_path / "killed")})
    for number, (nth, victim) in enumerate([(6, 0), (7, 1)]):
        kill_at(WORLD, config, tmp_path / f"hold{number}", point="after the step", nth=nth, victim=victim)
    assert run(WORLD, jobs.train, config) == [0] * WORLD
    assert 0 not in [event["step"] % 7 for event in events(config, "start")[1:]]
    assert rows(config) == rows(straight)
    assert [row["step"] for row in rows(config)] == [7, 14]
    assert all(None not in row.values() for row in rows(config))


def test_every_point_is_tested() -> None:
    killed = {point for point, _, _ in (*IN_THE_STEP, *IN_THE_WRITER, *AT_THE_START)}
    assert killed >= {*RANK_POINTS, *WRITER_POINTS} - {"writer: in retention, after the fencing check"}
