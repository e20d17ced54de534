"""The state that a run restores from a checkpoint, and the data sets that fit it."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.checkpoint.manifest import Manifest
from dit_scale.config import TrainConfig
from dit_scale.data.shards import LatentDataset
from dit_scale.errors import ConfigError
from dit_scale.train.dataset_check import check_dataset
from dit_scale.train.run_state import RunState, merge_ranges
from tests.support.latents import write_latents

RANGES = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda pair: (pair[0], sum(pair))), max_size=6
)


@given(RANGES)
def test_merged_ranges_hold_each_position_once(ranges: list[tuple[int, int]]) -> None:
    found = merge_ranges(tuple(ranges))
    assert {position for pair in found for position in range(*pair)} == {
        position for pair in ranges for position in range(*pair)
    }
    for (_, end), (start, _) in pairwise(found):
        assert end < start, "sorted, disjoint and not adjacent"


def test_the_state_is_restored_from_a_manifest() -> None:
    guard = {"loss": 0.5, "grad_norm": 0.25, "updates": 8.0, "failed_in_a_row": 0.0}
    manifest = Manifest(
        step=9,
        samples=63,
        attempt=2,
        config={},
        data_sha256="d",
        vae_sha256="v",
        model_shapes={},
        optimizer_groups=(),
        pending_metrics=((1.0, 2.0, 3.0, 4.0, 0.0),),
        guard=guard,
        skipped_steps=(4,),
        excluded_positions=((7, 14),),
        quarantined={3: "damaged"},
    )
    assert RunState.of(manifest, ((14, 21), (70, 77))) == RunState(
        step=9,
        pending=((1.0, 2.0, 3.0, 4.0, 0.0),),
        guard=guard,
        skipped=(4,),
        excluded=((7, 21), (70, 77)),
        quarantined={3: "damaged"},
    )
    RunState.of(manifest, ()).quarantined[5] = "damaged later"
    assert manifest.quarantined == {3: "damaged"}, "a copy"


def config_of(data: Path, num_classes: int = 10, image_size: int = 32) -> TrainConfig:
    model = {"name": "DiT-Ti/2", "image_size": image_size, "num_classes": num_classes}
    return TrainConfig.model_validate({"model": model, "data": {"url": str(data)}})


def test_a_data_set_fits_a_model_of_its_size_with_enough_classes(tmp_path: Path) -> None:
    write_latents(tmp_path, num=4, image_size=32, num_classes=10)
    dataset = LatentDataset.open(tmp_path)
    for num_classes in (10, 11):
        note = check_dataset(config_of(tmp_path, num_classes), dataset)
        assert bool(note) == (num_classes == 11)
    assert "has 10 classes, model.num_classes is 11: labels 10 and above are never trained" in note
    with pytest.raises(ConfigError, match=r"has 10 classes, but model.num_classes is 9"):
        check_dataset(config_of(tmp_path, num_classes=9), dataset)
    with pytest.raises(ConfigError, match=r"holds latents of 32 px images, but model.image_size is 64"):
        check_dataset(config_of(tmp_path, image_size=64), dataset)


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    write_latents(tmp_path, num=0)
    with pytest.raises(ConfigError, match="holds no samples"):
        check_dataset(config_of(tmp_path), LatentDataset.open(tmp_path))
