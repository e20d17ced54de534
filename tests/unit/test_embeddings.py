"""Position and timestep embeddings against numbers computed from their definitions."""

import numpy as np
import pytest
import torch
from torch import nn

from dit_scale.models.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    add_positions,
    sincos_pos_embed,
    sincos_table,
    timestep_sinusoid,
)


@pytest.mark.parametrize(
    ("width", "grid", "total", "norm"),
    [
        (1152, 16, 134598.947804, 384.0),
        (1152, 32, 494676.299373, 768.0),
        (384, 16, 44720.338560, None),
    ],
)
def test_position_embedding_sums(width, grid, total, norm):
    table = sincos_table(width, grid)
    assert table.dtype == np.float64
    assert table.shape == (grid * grid, width)
    assert table.sum() == pytest.approx(total, abs=1e-6)
    if norm is not None:
        assert np.linalg.norm(table) == pytest.approx(norm, abs=1e-9)


def test_position_embedding_has_columns_then_rows():
    width, grid = 16, 5
    table = sincos_table(width, grid).reshape(grid, grid, 4, width // 4)  # row, column, quarter, frequency
    for row in range(grid):
        for column in range(grid):
            for i in range(width // 4):
                frequency = 10000 ** (-i / (width // 4))
                expected = [
                    *(np.sin(column * frequency), np.cos(column * frequency)),
                    *(np.sin(row * frequency), np.cos(row * frequency)),
                ]
                np.testing.assert_allclose(table[row, column, :, i], expected, atol=1e-15)


def test_position_embedding_is_rounded_once():
    embed = sincos_pos_embed(384, 16)
    assert embed.dtype == torch.float32
    assert embed.shape == (1, 256, 384)
    np.testing.assert_array_equal(embed[0].numpy(), sincos_table(384, 16).astype(np.float32))


def test_positions_are_added_in_fp32():
    x = torch.full((1, 4, 8), 300.0, dtype=torch.bfloat16)
    positions = torch.full((1, 4, 8), 1.4)
    out = add_positions(x, positions)
    assert out.dtype == torch.bfloat16
    # 301.4 rounds to 302 (bf16 steps by 2 here).
    assert out.unique().tolist() == [302.0]


def test_timestep_sinusoid_numbers():
    features = timestep_sinusoid(torch.tensor([999, 0]))
    assert features.shape == (2, 256)
    assert features.dtype == torch.float32
    known = features[0, [0, 127, 128, 255]].tolist()
    assert known == pytest.approx([0.99965, 0.994243, -0.026461, 0.107147], abs=5e-6)
    assert features[1].tolist() == [1.0] * 128 + [0.0] * 128


def test_timestep_sinusoid_equals_float64():
    t = np.arange(1000.0)
    angles = t[:, None] * np.exp(-np.log(10000) * np.arange(128) / 128)
    expected = np.concatenate((np.cos(angles), np.sin(angles)), axis=1)
    difference = np.abs(timestep_sinusoid(torch.arange(1000)).numpy() - expected).max()
    print(f"largest difference {difference:.2e}")
    assert difference < 2e-4  # an angle near 1000 has fp32 steps of 6e-5


def test_timesteps_stay_distinct_with_bf16_weights():
    """The sinusoid is fp32 for any type of weights: in bf16, 998 and 999 would be the same number."""
    embedder = TimestepEmbedder(32).bfloat16()
    first, last = embedder(torch.tensor([998, 999]), torch.bfloat16)
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, last)


def test_timesteps_may_be_integers_or_floats():
    whole = torch.tensor([0, 17, 999])
    assert torch.equal(timestep_sinusoid(whole), timestep_sinusoid(whole.float()))


def test_label_embedder_has_a_last_row_for_the_null_class():
    embedder = LabelEmbedder(10, 8).train()
    assert embedder.embedding_table.weight.shape == (11, 8)
    assert torch.equal(embedder(torch.tensor([10, 3])), embedder.embedding_table.weight[[10, 3]])


def test_patches_are_read_row_by_row():
    embed = PatchEmbed(channels=2, patch=2, width=8)
    nn.init.eye_(embed.proj.weight.data.view(8, 8))  # a token is then its patch, (channel, row, column)
    nn.init.zeros_(embed.proj.bias)
    x = torch.arange(2 * 4 * 6, dtype=torch.float32).view(1, 2, 4, 6)
    tokens = embed(x)
    assert tokens.shape == (1, 6, 8)
    assert tokens[0, 1].tolist() == x[0, :, 0:2, 2:4].flatten().tolist()
    assert tokens[0, 3].tolist() == x[0, :, 2:4, 0:2].flatten().tolist()
