"""`dit-scale config`: every key with its type, default and help text."""

import json

import pytest
import yaml

from dit_scale import cli
from dit_scale.config import EncodeConfig, Section, TrainConfig, dump
from dit_scale.keys import Key, groups


def keys(root: type[Section], *wanted: str) -> dict[str, Key]:
    return {key.key: key for group in groups(root, wanted) for key in group.keys}


def flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    """A dumped configuration by dotted keys."""
    found: dict[str, object] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("root", [TrainConfig, EncodeConfig])
def test_the_keys_are_those_of_a_dumped_configuration(root: type[Section]) -> None:
    dumped = flat(yaml.safe_load(dump(root())))
    shown = {name: key.default for name, key in keys(root).items() if "[]" not in name}
    assert set(shown) == set(dumped)
    assert {name: value for name, value in dumped.items() if shown[name] != value and name != "ema"} == {}


@pytest.mark.parametrize("root", [TrainConfig, EncodeConfig])
def test_every_key_and_section_is_explained(root: type[Section]) -> None:
    found = groups(root)
    assert [group.name for group in found if not group.doc] == []
    assert [key.key for group in found for key in group.keys if not (key.doc and key.type)] == []


def test_types_and_limits() -> None:
    found = keys(TrainConfig)
    assert found["optimizer.betas"].type == "[float >= 0, < 1, float >= 0, < 1]"
    assert found["model.conditioning"].type == "adaln_zero | adaln | cross_attention | in_context"
    assert found["ema"].type == "[{name, decay, sigma_rel}, ...]"
    assert found["ema"].default == [{"name": "paper", "decay": 0.9999}]
    assert found["ema[].decay"].type == "float > 0, < 1 | null"
    assert found["ema[].name"].required
    assert keys(EncodeConfig)["image_size"].type == "int > 0, multiple of 8"


def test_sections_and_single_keys() -> None:
    assert set(keys(TrainConfig, "ema")) == {"ema", "ema[].name", "ema[].decay", "ema[].sigma_rel"}
    assert list(keys(TrainConfig, "guard.max_rollbacks", "seed")) == ["seed", "guard.max_rollbacks"]
    assert all(name.startswith("log.") for name in keys(TrainConfig, "log"))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in keys(TrainConfig))
    assert cli.main(["config", "encode", "vae_batch"]) == 0
    printed = capsys.readouterr().out
    assert "vae_batch" in printed
    assert "int > 0" in printed
    assert "shard_samples" not in printed
    assert cli.main(["config", "encode", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in rows] == list(keys(EncodeConfig))
    assert set(rows[0]) == {"key", "type", "default", "required", "doc"}


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["lr"], "optimizer.lr"),
        (["optimzer"], "optimizer"),
        (["engine.precison"], "engine.precision"),
        (["encode", "vae_bacth"], "vae_batch"),
    ],
)
def test_an_unknown_key(words: list[str], near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", *words]) == 2
    assert f"unknown key {words[-1]!r}; did you mean {near!r}?" in capsys.readouterr().err
