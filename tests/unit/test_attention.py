"""Every backend computes softmax(q k^T K**-0.5) v; a missing one says how to get it."""

import inspect
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import (
    SDPBackend,
    _fa3,
    _fa4,
    current_flash_attention_impl,
    list_flash_attention_impls,
)
from torch.utils._python_dispatch import TorchDispatchMode

from dit_scale.config import TrainConfig
from dit_scale.errors import ConfigError, DeviceError
from dit_scale.models import attention

CPU_BACKENDS = ("sdpa", "sdpa_flash", "sdpa_math")


def draw_qkv(num_queries, num_keys, seed=0):
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return draw(2, 3, num_queries, 24), draw(2, 3, num_keys, 24), draw(2, 3, num_keys, 24)


def plain_attention(q, k, v):
    scores = torch.einsum("bhqk,bhtk->bhqt", q.double(), k.double()) * 24**-0.5
    return torch.einsum("bhqt,bhtk->bhqk", scores.softmax(-1), v.double()).float()


@pytest.mark.parametrize("num_keys", [16, 2])
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_backend_equals_the_formula(name, num_keys):
    q, k, v = draw_qkv(16, num_keys)
    difference = (attention.choose(name)(q, k, v) - plain_attention(q, k, v)).abs().max().item()
    print(f"{name}: largest difference {difference:.2e}")
    assert difference < 2e-6


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_gradients_of_backends_agree(name):
    gradients = []
    for attend in (attention.choose(name), plain_attention):
        qkv = [x.requires_grad_() for x in draw_qkv(16, 16)]
        gradients.append(torch.autograd.grad(attend(*qkv).square().sum(), qkv))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_bf16_on_a_cpu_runs_the_kernel_of_fp32_in_both_passes():
    types = []

    class Kernels(TorchDispatchMode):
        def __torch_dispatch__(self, operator, _types, args=(), kwargs=None):
            if "scaled_dot_product" in operator.name():
                types.append((operator.name().removeprefix("aten::"), args[0].dtype))
            return operator(*args, **(kwargs or {}))

    qkv = [x.bfloat16().requires_grad_() for x in draw_qkv(16, 16)]
    with Kernels():
        o = attention.choose("sdpa")(*qkv)
        gradients = torch.autograd.grad(o.square().sum(), qkv)
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert types == [(kernel, torch.float32), (f"{kernel}_backward", torch.float32)]
    assert {x.dtype for x in (o, *gradients)} == {torch.bfloat16}
    exact = F.scaled_dot_product_attention(*(x.detach().float() for x in qkv))
    assert torch.equal(o, exact.bfloat16())


def test_unknown_name_lists_the_backends():
    with pytest.raises(
        ConfigError, match=r"unknown attention backend 'flash5'; expected one of sdpa, .*flash4"
    ):
        attention.choose("flash5")


@pytest.mark.parametrize("name", ["sdpa_efficient", "sdpa_cudnn"])
def test_cuda_kernel_without_cuda(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"'{name}' needs a CUDA device.*use attention: sdpa"):
        attention.choose(name)


@pytest.mark.parametrize(
    ("name", "module", "advice"),
    [
        ("flash2", "flash_attn", "pip install flash-attn --no-build-isolation"),
        ("flash3", "flash_attn_interface", "build the folder `hopper`"),
        ("flash4", "flash_attn", 'pip install "flash-attn-4==4.0.0b18"'),
    ],
)
def test_missing_package_says_how_to_get_it(name, module, advice, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DeviceError, match=f"'{name}' needs a package .*{module}.*{advice}.*attention: sdpa"):
        attention.choose(name)


@pytest.mark.parametrize(
    ("name", "register", "module"),
    [
        ("flash3", _fa3.register_flash_attention_fa3, "flash_attn_interface"),
        ("flash4", _fa4.register_flash_attention_fa4, "flash_attn.cute.interface"),
    ],
)
def test_torch_has_the_implementation_and_imports_the_package_of_the_advice(
    name, register, module, monkeypatch
):
    """A module of that name without kernels is found by torch, and refused before anything is registered."""
    assert attention._TORCH_FLASH[name] in list_flash_attention_impls()
    assert inspect.signature(register).parameters["module_path"].default == module
    parents = [module.rsplit(".", count)[0] for count in range(1, module.count(".") + 1)]
    for found in (module, *parents):
        monkeypatch.setitem(sys.modules, found, types.ModuleType(found))
    with pytest.raises(
        DeviceError, match=rf"'{name}' needs a package .*{module}' does not expose .* kernels"
    ):
        attention.choose(name)
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize("module", [_fa3, _fa4])
def test_torchs_flash_kernels_obey_the_determinism_switch(module):
    source = inspect.getsource(module)
    assert "deterministic = torch.are_deterministic_algorithms_enabled()" in source
    assert "_scaled_dot_product_flash_attention_backward" in source


def test_a_kernel_that_does_not_run_is_refused_when_it_is_chosen():
    """The memory-efficient kernel needs CUDA; on a CPU it fails as a kernel for another GPU would."""
    attend = partial(attention._sdpa_pinned, SDPBackend.EFFICIENT_ATTENTION)
    with pytest.raises(
        DeviceError, match=r"'flash4' does not run on this cpu device .*; expected: pip install"
    ):
        attention.require_working("flash4", attend, torch.device("cpu"))
    attention.require_working("sdpa_flash", attention.choose("sdpa_flash"), torch.device("cpu"))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_package_of_flash2_gets_its_layout(deterministic, monkeypatch):
    """The package needs a GPU; here a function with its signature records what it is handed."""
    calls = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, deterministic=False):
        calls.append((q.shape, k.shape, softmax_scale, causal, deterministic))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    q, k, v = draw_qkv(16, 2)
    torch.testing.assert_close(attention._flash2(flash_attn_func, q, k, v), plain_attention(q, k, v))
    assert calls == [((2, 16, 3, 24), (2, 2, 3, 24), None, False, deterministic)]


@pytest.mark.parametrize(
    ("backend", "engine", "problem"),
    [
        ("sdpa_cudnn", {"precision": "bf16"}, "sdpa_cudnn has no deterministic backward.*determinism=fast"),
        ("sdpa_cudnn", {"determinism": "fast"}, ""),
        ("sdpa_cudnn", {"determinism": "fast", "precision": "fp32"}, "sdpa_cudnn computes only in bf16"),
        ("sdpa_flash", {"precision": "fp32", "device": "cuda"}, "sdpa_flash computes only .* is fp32; use"),
        ("sdpa_flash", {"precision": "fp32", "device": "cpu"}, ""),
        ("sdpa_flash", {"precision": "fp32"}, ""),
        ("flash4", {"precision": "fp32"}, "flash4 computes only .* engine.precision=bf16"),
        ("flash4", {"precision": "auto"}, ""),
        ("sdpa", {"precision": "fp32"}, ""),
    ],
)
def test_a_configuration_refuses_a_backend_that_its_settings_exclude(backend, engine, problem):
    tree = {"model": {"attention": backend}, "engine": engine}
    if not problem:
        TrainConfig.model_validate(tree)
        return
    with pytest.raises(ValueError, match=problem):
        TrainConfig.model_validate(tree)


def test_pinned_backend_compiles_without_graph_breaks():
    attend = torch.compile(attention.choose("sdpa_math"), backend="eager", fullgraph=True)
    q, k, v = draw_qkv(16, 16)
    torch.testing.assert_close(attend(q, k, v), plain_attention(q, k, v))
