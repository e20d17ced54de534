"""Every backend computes softmax(q k^T K**-0.5) v; a missing one says how to get it."""

import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dit_scale.errors import ConfigError, DeviceError
from dit_scale.models import attention

CPU_BACKENDS = ("sdpa", "sdpa_flash", "sdpa_math")
FLASH_PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}


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
    ("name", "advice"),
    [
        ("flash2", "pip install flash-attn --no-build-isolation"),
        ("flash3", "build the folder `hopper`"),
        ("flash4", "pip install flash-attn-4"),
    ],
)
def test_missing_package_says_how_to_get_it(name, advice, monkeypatch):
    monkeypatch.setitem(sys.modules, FLASH_PACKAGES[name], None)
    with pytest.raises(DeviceError, match=f"'{name}' needs the package {FLASH_PACKAGES[name]}.*{advice}"):
        attention.choose(name)


@pytest.mark.parametrize("returns_lse", [False, True])
@pytest.mark.parametrize("name", sorted(FLASH_PACKAGES))
def test_flash_package_gets_its_layout(name, returns_lse, monkeypatch):
    """The packages need a GPU; here a stand-in with their signature records what it is handed."""
    calls = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, deterministic=False):
        calls.append((q.shape, k.shape, softmax_scale, causal, deterministic))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return (out.transpose(1, 2), None) if returns_lse else out.transpose(1, 2)

    module = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, FLASH_PACKAGES[name], module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    q, k, v = draw_qkv(16, 2)
    torch.testing.assert_close(attention.choose(name)(q, k, v), plain_attention(q, k, v))
    assert calls == [((2, 16, 3, 24), (2, 2, 3, 24), None, False, True)]


def test_pinned_backend_compiles_without_graph_breaks():
    attend = torch.compile(attention.choose("sdpa_math"), backend="eager", fullgraph=True)
    q, k, v = draw_qkv(16, 16)
    torch.testing.assert_close(attend(q, k, v), plain_attention(q, k, v))
