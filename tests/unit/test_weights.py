"""Weights files: published names, other formats, and diffusers' model with the same weights."""

import argparse
import json
import struct

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from dit_scale import weights
from dit_scale.config import ModelConfig
from dit_scale.errors import WeightsError
from dit_scale.models.dit import build
from dit_scale.models.zoo import shape_of

SMALL = ModelConfig(name="DiT-Ti/2", image_size=64, num_classes=10)


def published_shapes(tokens):
    """Return names and shapes of the 292 tensors of DiT-XL-2-256x256.pt and DiT-XL-2-512x512.pt."""
    d = 1152

    def linear(name, num_out, num_in):
        return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}

    shapes = {
        "pos_embed": (1, tokens, d),
        "x_embedder.proj.weight": (d, 4, 2, 2),
        "x_embedder.proj.bias": (d,),
        **linear("t_embedder.mlp.0", d, 256),
        **linear("t_embedder.mlp.2", d, d),
        "y_embedder.embedding_table.weight": (1001, d),
    }
    for i in range(28):
        shapes |= linear(f"blocks.{i}.attn.qkv", 3456, d)
        shapes |= linear(f"blocks.{i}.attn.proj", d, d)
        shapes |= linear(f"blocks.{i}.mlp.fc1", 4608, d)
        shapes |= linear(f"blocks.{i}.mlp.fc2", d, 4608)
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", 6912, d)
    return shapes | linear("final_layer.linear", 32, d) | linear("final_layer.adaLN_modulation.1", 2304, d)


def write_hollow_pt(path, shapes):
    """Write a .pt file with the full shapes in a few kilobytes: each tensor has zero strides."""
    torch.save({name: torch.full((1,), 0.5).expand(shape) for name, shape in shapes.items()}, path)


def write_hollow_safetensors(path, shapes):
    """Write a safetensors file with the full shapes whose data is a sparse hole that reads as zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def random_model(config=SMALL, seed=0):
    model = build(config, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def draw_batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0, 400, 999]), torch.tensor([0, 7, 10])


# --- the published weights


@pytest.mark.parametrize(
    ("suffix", "write"), [("pt", write_hollow_pt), ("safetensors", write_hollow_safetensors)]
)
@pytest.mark.parametrize(("image_size", "tokens"), [(256, 256), (512, 1024)])
def test_published_names_and_shapes_load_strictly(image_size, tokens, suffix, write, tmp_path):
    shapes = published_shapes(tokens)
    assert len(shapes) == 292
    path = tmp_path / f"DiT-XL-2.{suffix}"
    write(path, shapes)
    model = build(ModelConfig(name="DiT-XL/2", image_size=image_size), 0, device="meta", initialise=False)
    weights.load_into(model, weights.read(path))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_are_read_bit_for_bit(suffix, tmp_path):
    source, path = random_model(), tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    for target in (build(SMALL, seed=1), build(SMALL, seed=1, device="meta", initialise=False)):
        weights.load_into(target, weights.read(path))
        with torch.no_grad():
            assert torch.equal(target(*draw_batch()), source(*draw_batch()))


def test_loading_keeps_the_type_of_the_model(tmp_path):
    target = build(SMALL, seed=1).bfloat16()
    weights.load_into(target, random_model().state_dict())
    assert {name for name, tensor in target.state_dict().items() if tensor.dtype == torch.float32} == {
        "pos_embed"
    }


def test_a_training_checkpoint_yields_its_ema(tmp_path):
    model, ema = random_model(seed=1).state_dict(), random_model(seed=2).state_dict()
    checkpoint = {
        "model": model,
        "ema": ema,
        "opt": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4),
    }
    torch.save(checkpoint, tmp_path / "0400000.pt")
    state = weights.read(tmp_path / "0400000.pt")
    assert state.keys() == ema.keys()
    assert all(torch.equal(state[name], ema[name]) for name in ema)


def test_old_torch_format_is_read(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert weights.read(tmp_path / "old.pt")["a"].tolist() == [0.0, 1.0, 2.0]


# --- files that cannot be used


class Trap:
    """Unpickling it would call a function that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1), "trap": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(
        WeightsError,
        match=r"got io.open, which cannot be read without executing code.*save only the state dict",
    ):
        weights.read(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.zeros(1)], "expected tensors by name, got list"),
        ({}, "expected tensors by name, got dict"),
        ({"a": torch.zeros(1), "step": 7}, "expected tensors by name.*got int under 'step'"),
        (
            {"model": {"a": torch.zeros(1), "b": {}}},
            r"odd.pt, under 'model': expected tensors by name, or a dict with 'ema', .* got dict under 'b'",
        ),
    ],
)
def test_invalid_content(content, complaint, tmp_path):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(WeightsError, match=complaint):
        weights.read(tmp_path / "odd.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_damaged_file(suffix, keep, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(random_model().state_dict(), path)
    else:
        save_file(random_model().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(WeightsError, match=r"weights\.\w+ is damaged or not"):
        weights.read(path)


def test_missing_file_and_unknown_suffix(tmp_path):
    with pytest.raises(WeightsError, match=r"no weights file at .*nowhere.pt"):
        weights.read(tmp_path / "nowhere.pt")
    (tmp_path / "weights.npz").touch()
    with pytest.raises(WeightsError, match=r"ends in .safetensors, .* .ckpt or .bin, got .npz"):
        weights.read(tmp_path / "weights.npz")


def test_weights_of_another_model_are_refused():
    model = build(SMALL, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = dict(random_model(SMALL.model_copy(update={"image_size": 128})).state_dict())
    for name in (
        "blocks.0.mlp.fc1.bias",
        "blocks.1.mlp.fc1.bias",
        "blocks.2.mlp.fc1.bias",
        "final_layer.linear.bias",
    ):
        del state[name]
    state["head.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        weights.load_into(model, state)
    assert str(caught.value) == (
        "weights do not match the model; "
        "4 missing: blocks.0.mlp.fc1.bias, blocks.1.mlp.fc1.bias, blocks.2.mlp.fc1.bias, ...; "
        "1 unexpected: head.weight; "
        "1 with another shape: pos_embed (got (1, 64, 128), expected (1, 16, 128)); "
        "model name, image size, conditioning and number of classes must be those of the training run"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- writing


def test_written_file_is_fp32_with_metadata_and_leaves_no_other_file(tmp_path):
    state = random_model().bfloat16().state_dict()
    path = tmp_path / "export" / "ema.safetensors"
    weights.write(state, path, {"profile": "paper", "step": "400000"})
    assert [entry.name for entry in path.parent.iterdir()] == ["ema.safetensors"]
    written = load_file(path)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name].float()) for name in state)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"profile": "paper", "step": "400000"}


# --- diffusers


@pytest.fixture(scope="module")
def their_model():
    """Build diffusers' model of the small shape, with the paper's timestep frequencies."""
    from diffusers import models
    from diffusers.models.embeddings import Timesteps

    shape = shape_of(SMALL)
    model = models.DiTTransformer2DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.width // shape.heads,
        out_channels=2 * shape.in_channels,
        num_layers=shape.depth,
        sample_size=shape.latent_size,
        patch_size=shape.patch,
        num_embeds_ada_norm=shape.num_classes,
    )
    for block in model.transformer_blocks:
        # diffusers uses 10000**(-i / 127); the paper's code and ours use 10000**(-i / 128).
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return model.eval()


def test_diffusers_computes_the_same_from_our_weights(their_model):
    ours = random_model()
    their_model.load_state_dict(weights.to_diffusers(ours.state_dict(), ours.shape), strict=True)
    with torch.no_grad():
        out, theirs = ours(*draw_batch()), their_model(*draw_batch()).sample
    difference = (out - theirs).abs().max().item()
    print(f"largest difference {difference:.2e} of {theirs.abs().max():.2f}")
    assert theirs.std() > 0.1
    assert difference < 1e-5


def test_we_compute_the_same_from_diffusers_weights(their_model, tmp_path):
    # Every tensor is random, including modulation; all blocks share one embedder, as in the published model.
    generator = torch.Generator().manual_seed(3)
    first = "transformer_blocks.0.norm1.emb"
    state = {
        name: 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in their_model.state_dict().items()
    }
    for name in state:
        if ".norm1.emb." in name:
            state[name] = state[first + name.partition(".norm1.emb")[2]]
    their_model.load_state_dict(state, strict=True)
    ours = build(SMALL, seed=0)
    weights.load_into(ours, weights.from_diffusers(their_model.state_dict(), ours.shape))
    with torch.no_grad():
        out, theirs = ours(*draw_batch()), their_model(*draw_batch()).sample
    assert theirs.std() > 0.1
    assert (out - theirs).abs().max().item() < 1e-5


def test_round_trip_keeps_every_bit(tmp_path):
    ours = random_model()
    weights.write(weights.to_diffusers(ours.state_dict(), ours.shape), tmp_path / "theirs.safetensors", {})
    state = weights.from_diffusers(weights.read(tmp_path / "theirs.safetensors"), ours.shape)
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())


def test_diffusers_states_without_a_published_form():
    ours = random_model()
    state = weights.to_diffusers(ours.state_dict(), ours.shape)
    name = "transformer_blocks.4.norm1.emb.class_embedder.embedding_table.weight"
    with pytest.raises(WeightsError, match=f"{name} differs from transformer_blocks.0"):
        weights.from_diffusers({**state, name: state[name] + 1}, ours.shape)
    with pytest.raises(WeightsError, match=r"of a DiTTransformer2DModel with 6 blocks \(DiT-Ti/2\)"):
        weights.from_diffusers(
            {**state, "transformer_blocks.6.norm1.linear.bias": torch.zeros(1)}, ours.shape
        )
    with pytest.raises(WeightsError, match=r"missing tensor 'pos_embed.proj.weight' among 72 tensors"):
        weights.from_diffusers(ours.state_dict(), ours.shape)


@pytest.mark.parametrize("convert", [weights.to_diffusers, weights.from_diffusers])
def test_diffusers_supports_only_one_design(convert):
    shape = shape_of(SMALL.model_copy(update={"conditioning": "in_context"}))
    with pytest.raises(
        WeightsError, match="diffusers supports only conditioning adaln_zero, got 'in_context'"
    ):
        convert({}, shape)
