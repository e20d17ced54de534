"""Which checkpoint a run goes on from when its storage does not answer, and what it says of changes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_scale import dist
from dit_scale.checkpoint.manifest import CHECKPOINTS, MANIFEST, name_of
from dit_scale.checkpoint.partition import MASTER, Extent, Partition
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import CheckpointConfig, EngineConfig, TrainConfig
from dit_scale.dist import World
from dit_scale.storage import UnavailableError, open_storage, s3
from dit_scale.train.run import find_checkpoint, root_of, say_if_rate_changes
from tests import checkpoints
from tests.faults.proxy import FaultProxy
from tests.s3 import BUCKET, s3_server

NEWEST, OLDER = (f"{CHECKPOINTS}/{name_of(step, 1)}" for step in (40, 30))
WEIGHT, SIZE = "final_layer.linear.weight", 6


@pytest.fixture
def world() -> Iterator[World]:
    """A world of one."""
    threads = torch.get_num_threads()
    yield dist.start(EngineConfig(device="cpu"))
    dist.stop()
    torch.set_num_threads(threads)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The way to a server that this process knows."""
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"steps": 60}, "step 41 is 3.22e-05, with the saved configuration it was 5.96e-05"),
        ({"optimizer": {"lr": 1e-3}}, "step 41 is 0.001, with the saved configuration it was 5.96e-05"),
        ({"steps": 40}, ""),  # no step is left
        ({"optimizer": {"decay": "linear"}, "seed": 1}, ""),
    ],
)
def test_another_learning_rate_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    saved = {"steps": 100, "optimizer": {"decay": "linear"}}
    owned = [Partition({MASTER: torch.zeros(SIZE)}, (Extent(WEIGHT, 0, SIZE, 0),))]
    config = TrainConfig.model_validate(saved).model_dump(mode="json")
    checkpoints.write(open_storage(tmp_path), NEWEST, [owned], config=config)
    notes: list[str] = []
    checkpoint = Checkpoint(open_storage(tmp_path), NEWEST)
    say_if_rate_changes(TrainConfig.model_validate(saved | changes), checkpoint, notes.append)
    assert len(notes) == bool(said)
    assert said in "".join(notes)


def test_a_server_that_does_not_answer_is_no_damage(proxy: FaultProxy, world: World) -> None:
    config = TrainConfig(checkpoint=CheckpointConfig(url=f"s3://{BUCKET}/run"))
    root, digest = root_of(config), "1" * 64
    for path in (OLDER, NEWEST):
        owned = [Partition({MASTER: torch.zeros(SIZE)}, (Extent(WEIGHT, 0, SIZE, 0),))]
        known = {"config": config.model_dump(mode="json"), "data_sha256": digest}
        checkpoints.write(root, path, [owned], **known)
    notes: list[str] = []

    def read(checkpoint: Checkpoint) -> None:
        checkpoint.read(MASTER, WEIGHT, 0, SIZE)

    def read_too_late(checkpoint: Checkpoint) -> None:
        proxy.set({"error": 1.0})
        read(checkpoint)

    def find(fill: Callable[[Checkpoint], None]) -> Checkpoint | None:
        return find_checkpoint(config, digest, world, fill, notes.append)

    def assert_it_stops(fill: Callable[[Checkpoint], None]) -> None:
        with pytest.raises(UnavailableError, match=f"checkpoint {NEWEST} may be whole, .* tried 20 times"):
            find(fill)
        proxy.calm()

    for key in (MANIFEST, "rank-"):
        proxy.set({"error": 1.0}, only=f"{NEWEST}/{key}")
        assert_it_stops(read)
    assert_it_stops(read_too_late)
    assert notes == []
    assert str(find(read)) == f"{root.url}/{NEWEST}"
    root.delete(f"{NEWEST}/rank-00000.safetensors")
    assert str(find(read)) == f"{root.url}/{OLDER}"
    assert [note.startswith(f"passing over checkpoint {NEWEST}: ") for note in notes] == [True]
