"""Weights in the wrappers of other programs, in half precision, and in several shards."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dit_scale import weights
from dit_scale.errors import WeightsError
from dit_scale.weights.wrappers import KEYS, unwrap

EMA = {"blocks.0.attn.qkv.weight": torch.arange(6.0).reshape(2, 3), "final_layer.linear.bias": torch.ones(4)}
RAW = {name: -tensor for name, tensor in EMA.items()}

Wrapper = Callable[[dict[str, Any]], dict[str, Any]]


def prefixed(prefix: str) -> Wrapper:
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


WRAPPERS: dict[str, Wrapper] = {
    "flat": lambda state: state,
    "ema": lambda state: {"ema": state},
    "model": lambda state: {"model": state},
    "state_dict": lambda state: {"state_dict": state},
    "DeepSpeed": lambda state: {"module": state, "global_steps": 400_000},
    "module.": prefixed("module."),
    "_orig_mod.": prefixed("_orig_mod."),
    "module._orig_mod.": prefixed("module._orig_mod."),
    "_orig_mod.module.": prefixed("_orig_mod.module."),
    "compiled blocks": lambda state: {
        name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in state.items()
    },
    "training checkpoint": lambda state: {
        "model": prefixed("module.")(RAW),
        "ema": state,
        "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-XL/2"),
    },
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(7), **prefixed("module.")(state)},
}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_is_read(wrapper: str, suffix: str, tmp_path: Path) -> None:
    torch.save(WRAPPERS[wrapper](EMA), tmp_path / f"weights.{suffix}")
    assert_same(weights.read(tmp_path / f"weights.{suffix}"), EMA)


@pytest.mark.parametrize("wrapper", ["flat", "module.", "_orig_mod.", "module._orig_mod.", "AveragedModel"])
def test_prefixes_are_removed_from_safetensors(wrapper: str, tmp_path: Path) -> None:
    save_file(WRAPPERS[wrapper](EMA), tmp_path / "weights.safetensors")
    assert_same(weights.read(tmp_path / "weights.safetensors"), EMA)


@given(
    nesting=st.lists(st.sampled_from([*KEYS, "module.", "_orig_mod."]), max_size=6),
    companions=st.dictionaries(
        st.sampled_from(["opt", "epoch", "args", "scheduler"]), st.none() | st.integers(), max_size=3
    ),
)
def test_wrappers_nest_in_any_order(nesting: list[str], companions: dict[str, Any]) -> None:
    content: dict[str, Any] = EMA
    for wrapper in reversed(nesting):
        if wrapper in KEYS:
            content = {**companions, wrapper: content}
        elif all(isinstance(value, Tensor) for value in content.values()):
            content = prefixed(wrapper)(content)
    found = unwrap(content, "weights.pt")
    assert_same(found.tensors, EMA)
    assert found.keys == tuple(key for key in nesting if key in KEYS)


@given(st.permutations(["ema", "model", "state_dict", "module"]), st.integers(1, 4))
def test_averaged_weights_are_preferred(order: list[str], num: int) -> None:
    """With several wrappers side by side, "ema" wins wherever it stands; without it, "model"."""
    present = order[:num]
    found = unwrap({key: EMA if key == "ema" else RAW for key in present}, "weights.pt")
    assert_same(found.tensors, EMA if "ema" in present else RAW)
    assert found.keys == (min(present, key=KEYS.index),)


@pytest.mark.parametrize("absent", [None, {}])
def test_an_empty_ema_is_none(absent: object) -> None:
    assert unwrap({"ema": absent, "model": RAW}, "weights.pt").keys == ("model",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (EMA, "{path}"),
        ({"ema": EMA, "model": RAW}, "{path} (weights under 'ema')"),
        ({"state_dict": {"ema": EMA}}, "{path} (weights under 'state_dict' / 'ema')"),
        ({"model": RAW, "opt": {}}, "{path} (weights under 'model'; the file has no EMA)"),
        ({"state_dict": RAW}, "{path} (weights under 'state_dict'; the file has no EMA)"),
    ],
)
def test_a_file_without_an_ema_says_so(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    assert str(weights.read_file(path)) == said.format(path=path)


def test_two_names_of_one_tensor_are_refused() -> None:
    content = {"model": {"a.weight": torch.zeros(1), "module.a.weight": torch.ones(1)}}
    with pytest.raises(
        WeightsError,
        match=r"weights.pt, under 'model': 'a.weight' and 'module.a.weight' are the same tensor, 'a.weight'",
    ):
        unwrap(content, "weights.pt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_other_precisions_become_fp32(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    stored = {name: (tensor / 3).to(dtype) for name, tensor in EMA.items()}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(stored, path)
    else:
        save_file(stored, path)
    assert_same(weights.read(path), {name: tensor.float() for name, tensor in stored.items()})


def test_saved_by_the_programs_themselves(tmp_path: Path) -> None:
    """The names come from torch, not from this test."""
    layer = nn.Linear(2, 3)
    wrapped = nn.DataParallel(AveragedModel(layer))
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "weights.ckpt")
    assert_same(weights.read(tmp_path / "weights.ckpt"), dict(layer.state_dict()))


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    weights.write(EMA, tmp_path / "weights.safetensors", {})
    weights.write_pt(EMA, tmp_path / "weights.pt")
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "usual").stat().st_mode}


# --- shards


def write_shards(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    """Write two shards with one tensor each and an index; `weight_map` replaces the true one."""
    true_map = {}
    for number, (name, tensor) in enumerate(EMA.items(), 1):
        true_map[name] = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensor}, folder / true_map[name])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map or true_map}))
    return index


def test_shards_are_read(tmp_path: Path) -> None:
    assert_same(weights.read(write_shards(tmp_path)), EMA)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"shard model-00002-of-00002.safetensors, which is missing; down"):
        weights.read(index)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "a\\b.safetensors", "x.pt", 7]
)
def test_a_shard_never_escapes_the_folder(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    index = write_shards(folder, dict.fromkeys(EMA, name))  # type: ignore[arg-type]
    save_file(EMA, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"expected the name of a .safetensors file beside the index"):
        weights.read(index)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    save_file(EMA, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(
        WeightsError,
        match=r"model-00002-of-00002.safetensors holds the tensor 'blocks.0.attn.qkv.weight', which "
        r"model.safetensors.index.json expects in model-00001-of-00002.safetensors",
    ):
        weights.read(index)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        WeightsError, match=r"has no tensor 'blocks.0.attn.qkv.weight', which .* expects there"
    ):
        weights.read(index)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "names 'a' twice"),
    ],
)
def test_invalid_index(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=complaint):
        weights.read(tmp_path / "model.safetensors.index.json")
