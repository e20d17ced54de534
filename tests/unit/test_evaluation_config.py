"""The section `evaluate`: impossible settings are refused with what to do, and paths become absolute."""

from pathlib import Path
from typing import Any

import pytest

from dit_scale.config import TrainConfig, load
from dit_scale.errors import ConfigError
from dit_scale.train.changes import identity
from dit_scale.train.evaluation_keys import deciding_key, headline

DISTANCE = {"every_steps": 5, "images": 9, "network": "classifier:/c.safetensors", "reference": "/r.npz"}


def config_of(evaluate: dict[str, Any], **more: Any) -> TrainConfig:
    return TrainConfig.model_validate({"evaluate": evaluate, **more})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.every_steps=5", "evaluate.grid_images=0"], "nothing to evaluate"),
        (["evaluate.images=1"], "images=1 has no covariance"),
        (["evaluate.images=9"], "set network and reference"),
        (["evaluate.network=inception"], "expected KIND:PATH"),
        (["evaluate.held_out=1"], "evaluate.held_out"),
        (["checkpoint.keep_best=true"], r"set evaluate\.every_steps"),
        (["checkpoint.keep_best=true", "evaluate.every_steps=5"], r"evaluate\.held_out or evaluate\.images"),
    ],
)
def test_impossible_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, None, overrides)


def test_the_path_of_a_network_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(TrainConfig, None, ["evaluate.network=classifier:a/b.st", "evaluate.reference=r.npz"])
    assert config.evaluate.network == f"classifier:{tmp_path}/a/b.st"
    assert config.evaluate.reference == f"{tmp_path}/r.npz"
    assert load(TrainConfig, None, []).evaluate.network == ""


def test_held_out_samples_bind_the_run_and_nothing_else_does() -> None:
    plain = identity(config_of({}))
    assert identity(config_of({**DISTANCE, "seed": 3})) == plain
    few, other = identity(config_of({"held_out": 0.1})), identity(config_of({"held_out": 0.1, "seed": 3}))
    assert few["evaluate.held_out"] != plain["evaluate.held_out"]
    assert few != other


def test_the_number_that_decides() -> None:
    profiles = [{"name": "a", "decay": 0.9}, {"name": "b", "decay": 0.99}]
    assert deciding_key(config_of({**DISTANCE, "held_out": 0.1})) == "eval_frechet"
    assert deciding_key(config_of({"every_steps": 5, "held_out": 0.1}, ema=profiles)) == "eval_loss_ema.a"
    assert deciding_key(config_of({"every_steps": 5})) == ""


def test_the_headline_leaves_out_the_parts_of_the_loss() -> None:
    values = {"eval_frechet": 12.3456789, "eval_loss_raw": 0.5, "eval_mse_raw": 0.4, "eval_loss_ema.a": None}
    assert headline(values) == "eval_frechet 12.346, eval_loss_raw 0.5"
