"""Which checkpoint a run resumes from, whether it belongs to the same run, and which changes are reported."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.attempts import AttemptRecord
from dit_scale.checkpoint.manifest import MANIFEST, CheckpointId
from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import CheckpointConfig, TrainConfig
from dit_scale.dist import World
from dit_scale.elastic.run_progress import committed_step
from dit_scale.errors import ConfigError
from dit_scale.paths import with_absolute_paths
from dit_scale.storage import Storage, UnavailableError, open_storage, s3
from dit_scale.train.changes import say_changes
from dit_scale.train.restore import find_checkpoint
from dit_scale.train.run_folder import root_of
from tests.support import checkpoints
from tests.support.faults.proxy import FaultProxy
from tests.support.s3 import BUCKET, s3_server

STEPS = (40, 30, 20)
NEWEST, OLDER, OLDEST = (CheckpointId(step, 1) for step in STEPS)
WEIGHT, SIZE = "final_layer.linear.weight", 6
DATA_SHA256 = "1" * 64


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy between this process and its server."""
    monkeypatch.setattr(s3, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(s3, "LONGEST_PAUSE_S", 0.01)
    with (
        s3_server() as environment,
        FaultProxy(int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2])) as proxy,
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


RATE = "the learning rate of step 41 is {}; with the saved values it would be 5.96e-05"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"steps": 60}, ["steps: 100 -> 60", RATE.format("3.22e-05")]),
        (
            {"optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}},
            [
                "optimizer.lr: 0.0001 -> 0.001",
                "optimizer.betas: [0.9, 0.999] -> [0.9, 0.95]",
                "optimizer.decay: linear -> none",
                RATE.format("0.001"),
            ],
        ),
        ({"steps": 40}, ["steps: 100 -> 40"]),  # no steps remain
        ({"checkpoint": {"url": "s3://a/b"}}, ['checkpoint.url: "" -> s3://a/b']),
        ({"log": {"tensorboard": True}}, ["log.tensorboard: false -> true"]),
        ({"ema": [{"name": "new", "sigma_rel": 0.1}]}, []),  # reported when the averages are restored
        ({"run": str(Path("runs/dit_xl2_256").absolute())}, []),  # the same as in an older checkpoint
        ({"data": {"url": "/elsewhere"}}, [f"data.url: {Path('data/imagenet256').absolute()} -> /elsewhere"]),
    ],
)
def test_all_changes_are_reported(tmp_path: Path, changes: dict[str, Any], said: list[str]) -> None:
    saved = {"steps": 100, "optimizer": {"decay": "linear"}}
    owned = [Partition({MASTER: torch.zeros(SIZE)}, (ParameterSlice(WEIGHT, 0, SIZE, 0),))]
    config = TrainConfig.model_validate(saved).model_dump(mode="json")
    checkpoints.write(open_storage(tmp_path), NEWEST, [owned], config=config)
    notes: list[str] = []
    checkpoint = Checkpoint(open_storage(tmp_path), NEWEST)
    say_changes(with_absolute_paths(TrainConfig.model_validate(saved | changes)), checkpoint, notes.append)
    assert notes == said


def write(root: Storage, config: TrainConfig, *ids: CheckpointId, **fields: Any) -> None:
    """Write checkpoints of one small tensor, of a run with this configuration."""
    for checkpoint_id in ids:
        owned = [Partition({MASTER: torch.zeros(SIZE)}, (ParameterSlice(WEIGHT, 0, SIZE, 0),))]
        known = {"config": config.model_dump(mode="json"), "data_sha256": DATA_SHA256}
        checkpoints.write(root, checkpoint_id, [owned], **known, **fields)


def read(checkpoint: Checkpoint) -> None:
    checkpoint.read(MASTER, WEIGHT, 0, SIZE)


def test_an_unavailable_server_is_no_damage(proxy: FaultProxy, world: World) -> None:
    config = TrainConfig(checkpoint=CheckpointConfig(url=f"s3://{BUCKET}/run"))
    root = root_of(config)
    write(root, config, OLDER, NEWEST)
    notes: list[str] = []

    def read_too_late(checkpoint: Checkpoint) -> None:
        proxy.set({"error": 1.0})
        read(checkpoint)

    def find(fill: Callable[[Checkpoint], None]) -> Checkpoint | None:
        return find_checkpoint(config, DATA_SHA256, world, fill, notes.append)

    def assert_it_stops(fill: Callable[[Checkpoint], None]) -> None:
        with pytest.raises(
            UnavailableError, match=f"checkpoint {NEWEST.path()} may be intact, .* tried 20 times"
        ):
            find(fill)
        proxy.calm()

    for key in (MANIFEST, "rank-"):
        proxy.set({"error": 1.0}, only=f"{NEWEST.path()}/{key}")
        assert_it_stops(read)
    assert_it_stops(read_too_late)
    assert notes == []
    assert str(find(read)) == f"{root.url}/{NEWEST.path()}"
    root.delete(f"{NEWEST.path()}/rank-00000.safetensors")
    assert str(find(read)) == f"{root.url}/{OLDER.path()}"
    assert [note.startswith(f"skipping checkpoint {NEWEST.path()}: ") for note in notes] == [True]


@pytest.mark.parametrize(
    ("at_most_step", "expected"),
    [(41, NEWEST), (40, NEWEST), (39, OLDER), (30, OLDER), (29, OLDEST), (20, OLDEST), (19, None), (0, None)],
)
def test_the_newest_checkpoint_up_to_a_step_is_chosen(
    tmp_path: Path, world: World, at_most_step: int, expected: CheckpointId | None
) -> None:
    config = TrainConfig(run=str(tmp_path))
    write(root_of(config), config, *(NEWEST, OLDER, OLDEST))
    notes: list[str] = []
    found = find_checkpoint(config, DATA_SHA256, world, read, notes.append, at_most_step=at_most_step)
    assert (found.id if found else None, notes) == (expected, [])


def test_an_older_one_under_the_newest_name_is_skipped(tmp_path: Path, world: World) -> None:
    config = TrainConfig(run=str(tmp_path))
    write(root_of(config), config, NEWEST, OLDER)
    wrong = CheckpointId(90, 1).path()
    shutil.copytree(tmp_path / OLDER.path(), tmp_path / wrong)
    notes: list[str] = []
    found = find_checkpoint(config, DATA_SHA256, world, read, notes.append)
    assert found is not None
    assert found.id == NEWEST
    assert notes == [
        f"skipping checkpoint {wrong}: {tmp_path}/{wrong} holds step 30 of attempt 1: it was copied or "
        "renamed; its own name is 0000000030-0001"
    ]
    assert committed_step(root_of(config)) == 40


def test_a_run_reports_a_missing_newest_record_and_resumes(tmp_path: Path, world: World) -> None:
    config, newest = TrainConfig(run=str(tmp_path)), CheckpointId(35, 2)
    root = root_of(config)
    attempts.claim(root, AttemptRecord(1))
    write(root, config, NEWEST, OLDER)
    attempts.claim(root, AttemptRecord(2, OLDER))
    write(root, config, newest)
    root.delete("attempts/0002.json")
    notes: list[str] = []
    found = find_checkpoint(config, DATA_SHA256, world, read, notes.append)
    assert found is not None
    assert found.id == newest
    assert notes == ["attempts/0002.json is missing; the readable checkpoints of attempt 2 count"]


# One run, one identity

FREE = {
    "run",
    "steps",
    "model.attention",
    "data.url",
    "data.vae",
    "data.cache_dir",
    "data.cache_bytes",
    "data.prefetch_batches",
    "data.deadline_s",
    "data.damaged",
    "ema",
    "evaluate.every_steps",
    "evaluate.seed",
    "evaluate.grid_images",
    "evaluate.images",
    "evaluate.network",
    "evaluate.reference",
    "evaluate.sampler",
    "evaluate.sampling_steps",
    "evaluate.guidance",
    "evaluate.tile",
}
"""Keys that may change within a run (docs/determinism.md), in addition to entire sections."""
FREE_SECTIONS = ("optimizer", "engine", "checkpoint", "guard", "log")
BOUND: dict[str, object] = {
    "seed": 1,
    "global_batch": 255,
    "model.name": "DiT-XL/4",
    "model.image_size": 512,
    "model.conditioning": "adaln",
    "model.num_classes": 999,
    "model.timestep_embedding": "diffusers",
    "data.horizontal_flip": False,
    "data.window_shards": 1,
    "diffusion.timesteps": 999,
    "diffusion.label_dropout": 0.2,
    "evaluate.held_out": 0.1,
}
"""Keys that must not change, each with a value other than the default."""


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def changed(config: TrainConfig, key: str, value: object) -> TrainConfig:
    tree = config.model_dump(mode="json")
    *sections, name = key.split(".")
    inner = tree
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return TrainConfig.model_validate(tree)


def test_every_key_either_may_or_must_not_change() -> None:
    of_free_sections = {key for key in keys_of(TrainConfig) if key.startswith(FREE_SECTIONS)}
    assert not BOUND.keys() & (FREE | of_free_sections)
    assert FREE | of_free_sections | BOUND.keys() == {*keys_of(TrainConfig)}, "say where a new key belongs"


@pytest.mark.parametrize("key", BOUND)
def test_keys_that_determine_the_numbers_must_not_change(tmp_path: Path, world: World, key: str) -> None:
    config = TrainConfig(run=str(tmp_path))
    write(root_of(config), config, NEWEST)
    other = changed(config, key, BOUND[key])
    assert other != config
    with pytest.raises(ConfigError, match=rf"holds a run with another configuration: {key} was "):
        find_checkpoint(other, DATA_SHA256, world, read, print)


OTHER_VALUES: dict[str, object] = {
    "steps": 7,
    "model.attention": "sdpa_math",
    "data.damaged": "quarantine",
    "ema": [{"name": "another", "decay": 0.5}],
    "optimizer.lr": 1.0,
    "engine.precision": "fp32",
    "engine.micro_batch": 3,
    "checkpoint.every_steps": 3,
    "evaluate.seed": 1,
    "guard.rollback_after": 3,
    "log.every_steps": 3,
}


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_other_keys_may_change(tmp_path: Path, world: World, key: str) -> None:
    config = TrainConfig(run=str(tmp_path))
    write(root_of(config), config, NEWEST)
    other = changed(config, key, OTHER_VALUES[key])
    assert other != config
    found = find_checkpoint(other, DATA_SHA256, world, read, print)
    assert found is not None
    assert found.id == NEWEST


def test_a_run_keeps_its_data_set(tmp_path: Path, world: World) -> None:
    config = TrainConfig(run=str(tmp_path))
    write(root_of(config), config, NEWEST)
    with pytest.raises(
        ConfigError, match=r"another configuration: data\.url leads to another latent data set"
    ):
        find_checkpoint(config, "2" * 64, world, read, print)
