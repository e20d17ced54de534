"""The transformer: initialisation, its four designs against plain float64, types, casts and compilation."""

import copy
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dit_scale.config import ModelConfig
from dit_scale.errors import ConfigError
from dit_scale.models.dit import build, unpatchify
from dit_scale.models.embeddings import PatchEmbed, sincos_pos_embed, timestep_sinusoid
from dit_scale.models.zoo import CONDITIONINGS, shape_of
from tests.support.operators import Operators


def small_config(conditioning="adaln_zero", **knobs):
    return ModelConfig(
        **{"name": "DiT-Ti/2", "image_size": 64, "num_classes": 10, "conditioning": conditioning, **knobs}
    )


def random_model(conditioning="adaln_zero", seed=0, **knobs):
    """Build a model with random parameters: at initialisation most of them have no effect."""
    model = build(small_config(conditioning, **knobs), seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def draw_batch(batch=3, latent_size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, latent_size, latent_size, generator=generator)
    return x, torch.tensor([0, 400, 999])[:batch], torch.tensor([0, 7, 10])[:batch]


# --- the start of training


@pytest.mark.long  # the small models below cover the same
def test_xl2_predicts_exactly_zero_at_initialisation():
    model = build(ModelConfig(name="DiT-XL/2"), seed=0)
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(x, torch.tensor([500]), torch.tensor([207]))
    assert out.shape == (1, 8, 32, 32)
    assert out.count_nonzero() == 0


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_output_is_zero_at_initialisation(conditioning):
    out = build(small_config(conditioning), seed=0)(*draw_batch())
    assert out.shape == (3, 8, 8, 8)
    assert out.count_nonzero() == 0


def test_adaln_zero_blocks_start_as_the_identity():
    model = build(small_config(), seed=0)
    x = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.blocks[0](x, torch.ones(2, 128)), x)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_initial_distribution_of_every_parameter(conditioning):
    for name, parameter in build(small_config(conditioning, num_classes=1000), seed=0).named_parameters():
        zero_modulation = conditioning == "adaln_zero" and "adaLN" in name
        if name.endswith(".bias") or zero_modulation or name == "final_layer.linear.weight":
            assert parameter.count_nonzero() == 0, name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name
            assert parameter.mean().item() == pytest.approx(0, abs=1e-3), name
        else:
            num_out, num_in = parameter.flatten(1).shape
            bound = (6 / (num_in + num_out)) ** 0.5
            assert parameter.abs().max().item() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_weights_depend_only_on_the_seed():
    first = build(small_config(), seed=5).state_dict()
    torch.rand(7)
    again, other = (build(small_config(), seed=seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_building_does_not_use_the_global_generator():
    state = torch.get_rng_state()
    build(small_config(), seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_initial_bits_are_the_same_on_every_machine():
    crc = 0
    for parameter in build(small_config(), seed=0).parameters():
        crc = zlib.crc32(parameter.detach().numpy().tobytes(), crc)
    assert f"{crc:08x}" == "06919e90"


# --- the four designs


def plain_forward(state, shape, x, t, y):
    """Compute the model from its definition in float64, with weights looked up by name."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def heads(x):
        return x.reshape(*x.shape[:2], shape.heads, -1)

    def attend(q, k, v):
        scores = torch.einsum("bqhk,bthk->bhqt", heads(q), heads(k)) * (shape.width // shape.heads) ** -0.5
        return torch.einsum("bhqt,bthk->bqhk", scores.softmax(-1), heads(v)).flatten(2)

    def self_attention(name, x):
        qkv = linear(f"{name}.qkv", x)
        d = shape.width
        return linear(f"{name}.proj", attend(qkv[..., :d], qkv[..., d : 2 * d], qkv[..., 2 * d :]))

    def cross_attention(name, x, c):
        kv = linear(f"{name}.kv", c)
        return linear(f"{name}.proj", attend(linear(f"{name}.q", x), *kv.chunk(2, -1)))

    def mlp(name, x):
        return linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", x), approximate="tanh"))

    def modulation(name, c, chunks):
        return linear(f"{name}.adaLN_modulation.1", F.silu(c))[:, None].chunk(chunks, -1)

    p, grid = shape.patch, shape.grid
    patches = x.reshape(len(x), 4, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5).reshape(len(x), grid**2, -1)
    x = patches @ state["x_embedder.proj.weight"].flatten(1).T + state["x_embedder.proj.bias"]
    x = x + state["pos_embed"]
    t = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", timestep_sinusoid(t).double())))
    y = state["y_embedder.embedding_table.weight"][y]
    c = t + y
    if shape.conditioning == "in_context":
        x = torch.cat((x, t[:, None], y[:, None]), 1)
    for i in range(shape.depth):
        block = f"blocks.{i}"
        gates = 1.0, 1.0
        shifts = scales = 0.0, 0.0
        if shape.conditioning == "adaln_zero":
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block, c, 6)
            shifts, scales, gates = (shift1, shift2), (scale1, scale2), (gate1, gate2)
        elif shape.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = modulation(block, c, 4)
            shifts, scales = (shift1, shift2), (scale1, scale2)
        x = x + gates[0] * self_attention(f"{block}.attn", norm(x) * (1 + scales[0]) + shifts[0])
        if shape.conditioning == "cross_attention":
            x = x + cross_attention(f"{block}.cross_attn", norm(x), torch.stack((t, y), 1))
        x = x + gates[1] * mlp(f"{block}.mlp", norm(x) * (1 + scales[1]) + shifts[1])
    x = norm(x[:, : grid**2])
    if shape.conditioning in ("adaln_zero", "adaln"):
        shift, scale = modulation("final_layer", c, 2)
        x = x * (1 + scale) + shift
    out = linear("final_layer.linear", x).reshape(len(x), grid, grid, p, p, 8)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), 8, grid * p, grid * p)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_math"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_design_equals_its_definition(conditioning, attention):
    model = random_model(conditioning, attention=attention)
    x, t, y = draw_batch()
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        out, expected = model(x, t, y), plain_forward(state, model.shape, x.double(), t, y)
    difference = (out - expected).abs().max().item()
    print(f"{conditioning}, {attention}: largest difference {difference:.2e} of {expected.abs().max():.2f}")
    assert expected.std() > 0.1
    assert difference < 1e-5


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_timestep_and_class_matter(conditioning):
    model = random_model(conditioning)
    x, t, y = draw_batch()
    with torch.no_grad():
        out, other_t, other_y = model(x, t, y), model(x, t + 1, y), model(x, t, (y + 1) % 11)
    assert (out - other_t).abs().amax((1, 2, 3)).min() > 1e-4
    assert (out - other_y).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradient_reaches_every_parameter(conditioning):
    model = random_model(conditioning)
    model(*draw_batch()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A key bias adds the same number to all scores of a query, so it does not change the softmax.
        rows = parameter.grad.count_nonzero() / parameter.grad.numel()
        assert rows > (0.2 if name.startswith("y_embedder") else 0.6), (name, rows)


def test_samples_of_a_batch_are_independent():
    model = random_model()
    x, t, y = draw_batch()
    with torch.no_grad():
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(model(x, t, y), alone, rtol=1e-5, atol=1e-5)


def test_unpatchify_puts_each_number_in_its_place():
    shape = shape_of(small_config(name="DiT-Ti/4"))
    assert (shape.grid, shape.patch) == (2, 4)
    # A token's values are ordered (row, column, channel); each value encodes its position.
    tokens = torch.arange(4 * 4 * 4 * 8).view(1, 4, 4 * 4 * 8)
    image = unpatchify(tokens, shape)
    assert image.shape == (1, 8, 8, 8)
    for token, row, column, channel in [(0, 0, 0, 0), (1, 0, 3, 5), (2, 3, 1, 7), (3, 2, 2, 4)]:
        at = image[0, channel, token // 2 * 4 + row, token % 2 * 4 + column]
        assert at == ((token * 4 + row) * 4 + column) * 8 + channel


# --- types and devices


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.bfloat16(),
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.bfloat16),
        lambda model: copy.deepcopy(model).bfloat16().float(),
        lambda model: torch.nn.Sequential(model).bfloat16()[0],
    ],
    ids=["bfloat16", "half", "double", "to_dtype", "to_device_and_dtype", "there_and_back", "as_a_child"],
)
def test_position_embedding_keeps_its_fp32_bits(cast):
    model = cast(build(small_config(), seed=0))
    assert model.pos_embed.dtype == torch.float32
    assert torch.equal(model.pos_embed, sincos_pos_embed(128, 4))
    assert torch.equal(model.state_dict()["pos_embed"], sincos_pos_embed(128, 4))
    assert "pos_embed" not in dict(model.named_parameters())


def test_loaded_position_embedding_survives_a_cast():
    model = build(small_config(), seed=0)
    loaded = {**model.state_dict(), "pos_embed": torch.full((1, 16, 128), 1.001)}
    model.load_state_dict(loaded)
    assert torch.equal(model.bfloat16().pos_embed, loaded["pos_embed"])


def test_leaving_the_meta_device_computes_the_position_embedding():
    model = build(small_config(), seed=0, device="meta", initialise=False)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model.bfloat16().pos_embed.dtype == torch.float32
    assert torch.equal(model.to_empty(device="cpu").pos_embed, sincos_pos_embed(128, 4))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_bf16_is_close_to_fp32(conditioning):
    model = random_model(conditioning)
    x, t, y = draw_batch()
    with torch.no_grad():
        exact = model(x, t, y)
        rounded = model.bfloat16()(x, t, y)
    assert rounded.dtype == torch.float32
    error = ((rounded - exact).norm() / exact.norm()).item()
    print(f"{conditioning}: bf16 differs by {error:.2%}")
    assert 0 < error < 0.03


def test_timesteps_may_be_floats():
    model = random_model()
    x, t, y = draw_batch()
    with torch.no_grad():
        assert torch.equal(model(x, t, y), model(x, t.float(), y))


class HostReads(TorchDispatchMode):
    """Count operations that make the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_forward_and_backward_do_not_synchronize_the_host(conditioning):
    model, batch = random_model(conditioning), draw_batch()
    with HostReads() as reads:
        assert batch[0].sum().item() != 0  # checks the counter itself
        model(*batch).square().mean().backward()
    assert reads.count == 1


# --- attention backend and compilation


def test_model_records_its_attention_backend():
    assert build(small_config(attention="sdpa_math"), seed=0).attention_backend == "sdpa_math"
    with pytest.raises(ConfigError, match="unknown attention backend 'best'"):
        build(small_config(attention="best"), seed=0)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_blocks_share_one_compilation(conditioning):
    """The compiler backend only counts graphs: real compilation takes minutes on a GPU."""
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, batch = random_model(conditioning), draw_batch()
    names = list(model.state_dict())
    with torch.no_grad():
        eager = model(*batch)
        model.compile_blocks(backend=counting_backend, fullgraph=True)
        compiled = model(*batch)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert list(model.state_dict()) == names
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_residual_stream_is_row_major_through_all_blocks(conditioning):
    model = random_model(conditioning)
    seen = []

    def note(block, inputs, output):
        for x_BTD in (inputs[0], output):
            seen.append(x_BTD)
            x_BTD.register_hook(seen.append)  # its gradient

    for block in (*model.blocks, model.final_layer):
        block.register_forward_hook(note)
    model(*draw_batch()).square().sum().backward()
    assert len(seen) == 4 * (len(model.blocks) + 1)
    for x_BTD in seen:
        tokens, width = x_BTD.shape[1:]
        assert x_BTD.stride()[1:] == (width, 1), f"{tokens} tokens of {width}: strides {x_BTD.stride()}"


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_block_copies_nothing(conditioning):
    """Neither forward nor backward; the gradients of q, k and v are put together once."""
    block = random_model(conditioning).blocks[1]
    x_BTD = torch.randn(2, 16, 128, requires_grad=True)
    c = torch.randn(*((2, 128) if "adaln" in conditioning else (2, 2, 128)), requires_grad=True)
    with Operators() as seen:
        block(x_BTD, c).square().sum().backward()
    assert seen.called["aten::stack"] == (2 if conditioning == "cross_attention" else 1)
    assert not {"aten::clone", "aten::copy_", "aten::_to_copy"} & set(seen.called)


def test_the_layout_of_tokens_does_not_change_a_bit(monkeypatch):
    def transposed(embed, x_BCHW):
        return embed.proj(x_BCHW).flatten(2).transpose(1, 2)

    def run():
        model = random_model()
        out = model(*draw_batch())
        out.square().sum().backward()
        return out, [parameter.grad for parameter in model.parameters()]

    out, grads = run()
    monkeypatch.setattr(PatchEmbed, "forward", transposed)
    transposed_out, transposed_grads = run()
    assert torch.equal(out, transposed_out)
    for name, a, b in zip(dict(random_model().named_parameters()), grads, transposed_grads, strict=True):
        assert torch.equal(a, b), name
