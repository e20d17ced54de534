"""Parameters and multiply-adds of every model of the paper, and errors for unknown names."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_scale.config import ModelConfig
from dit_scale.errors import ConfigError
from dit_scale.models import dit, table, zoo
from dit_scale.models.blocks import AdaLnZeroBlock
from dit_scale.models.zoo import forward_macs, num_parameters, num_parameters_with_pos_embed, shape_of

# name, image size, conditioning, tokens, GMACs counted, parameters with the position embedding
TRUTH = [
    ("DiT-S/8", 256, "adaln_zero", 16, 0.358, 33_148_160),
    ("DiT-S/4", 256, "adaln_zero", 64, 1.413, 32_945_024),
    ("DiT-S/2", 256, "adaln_zero", 256, 6.056, 32_963_360),
    ("DiT-B/8", 256, "adaln_zero", 16, 1.418, 130_881_536),
    ("DiT-B/4", 256, "adaln_zero", 64, 5.565, 130_475_648),
    ("DiT-B/2", 256, "adaln_zero", 256, 23.005, 130_512_416),
    ("DiT-L/8", 256, "adaln_zero", 16, 5.011, 458_594_816),
    ("DiT-L/4", 256, "adaln_zero", 64, 19.696, 458_053_760),
    ("DiT-L/2", 256, "adaln_zero", 256, 80.698, 458_102_816),
    ("DiT-XL/8", 256, "adaln_zero", 16, 7.392, 675_683_072),
    ("DiT-XL/4", 256, "adaln_zero", 64, 29.044, 675_074_432),
    ("DiT-XL/2", 256, "adaln_zero", 256, 118.621, 675_129_632),
    ("DiT-XL/2", 512, "adaln_zero", 1024, 524.538, 676_014_368),
    ("DiT-XL/2", 256, "adaln", 256, 118.547, 600_747_296),
    ("DiT-XL/2", 256, "cross_attention", 256, 137.603, 598_090_784),
    ("DiT-XL/2", 256, "in_context", 256, 119.354, 449_326_112),
]


@pytest.mark.parametrize(("name", "image_size", "conditioning", "tokens", "gmacs", "parameters"), TRUTH)
def test_counts_of_the_paper(name, image_size, conditioning, tokens, gmacs, parameters):
    row = table.count(ModelConfig(name=name, image_size=image_size, conditioning=conditioning))
    assert row["tokens"] == tokens
    assert row["parameters_with_pos_embed"] == row["parameters_with_pos_embed_formula"] == parameters
    assert row["parameters"] == row["parameters_formula"]
    assert row["forward_macs"] == row["forward_macs_formula"]
    assert row["forward_macs"] / 1e9 == pytest.approx(gmacs, abs=5.1e-4)
    # The smallest published value has two digits: 0.36 for 0.358.
    assert gmacs == pytest.approx(row["paper_gmacs"], rel=1e-3, abs=5.1e-3)


def test_paper_column_is_complete():
    assert {(name, size, conditioning) for name, size, conditioning, *_ in TRUTH} == set(zoo.PAPER_GMACS)


def test_depth_width_and_heads_are_those_of_the_paper():
    assert {name: tuple(row) for name, row in zoo.SIZES.items()} == {
        "Nano": (2, 64, 2),  # this and the next are not in the paper; existing runs use them
        "Ti": (6, 128, 4),
        "S": (12, 384, 6),
        "B": (12, 768, 12),
        "L": (24, 1024, 16),
        "XL": (28, 1152, 16),
    }


def test_names_of_the_paper():
    small = ["DiT-S/8", "DiT-S/4", "DiT-S/2", "DiT-B/8", "DiT-B/4", "DiT-B/2"]
    large = ["DiT-L/8", "DiT-L/4", "DiT-L/2", "DiT-XL/8", "DiT-XL/4", "DiT-XL/2"]
    assert [*zoo.PAPER_NAMES] == small + large


def test_trainable_parameters_of_xl2_do_not_depend_on_image_size():
    shapes = [shape_of(ModelConfig(image_size=size)) for size in (256, 512)]
    assert [num_parameters(shape) for shape in shapes] == [674_834_720, 674_834_720]


def test_flops_of_one_image():
    shapes = [shape_of(ModelConfig(image_size=size)) for size in (256, 512)]
    assert [2 * forward_macs(shape) / 1e9 for shape in shapes] == pytest.approx([237.243, 1049.077], abs=5e-4)


@pytest.mark.parametrize("conditioning", zoo.CONDITIONINGS)
@pytest.mark.parametrize(("name", "image_size"), [("DiT-Nano/2", 32), ("DiT-Ti/3", 96), ("DiT-S/16", 256)])
def test_formulas_equal_the_model_outside_the_paper(name, image_size, conditioning):
    row = table.count(
        ModelConfig(name=name, image_size=image_size, conditioning=conditioning, num_classes=10)
    )
    assert row["parameters"] == row["parameters_formula"]
    assert row["forward_macs"] == row["forward_macs_formula"]
    assert row["paper_gmacs"] is None


@pytest.mark.parametrize("conditioning", zoo.CONDITIONINGS)
def test_one_counted_block_stands_for_all_blocks(conditioning):
    config = ModelConfig(name="DiT-Ti/2", image_size=64, conditioning=conditioning, num_classes=10)
    model = dit.build(config, seed=0, device="meta", initialise=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        index_B = torch.zeros(1, dtype=torch.int64, device="meta")
        model(torch.empty(1, 4, 8, 8, device="meta"), index_B, index_B)
    assert len(model.blocks) == 6
    assert table.count_forward_macs(model.shape) == counter.get_total_flops() // 2


def test_the_table_passes_through_one_block_for_each_row(monkeypatch):
    passed = []
    forward = AdaLnZeroBlock.forward
    monkeypatch.setattr(
        AdaLnZeroBlock, "forward", lambda block, x, c: passed.append(block) or forward(block, x, c)
    )
    table.count(ModelConfig(name="DiT-XL/2"))
    assert len(passed) == 1


def test_shape_of_parses_size_and_patch():
    shape = shape_of(ModelConfig(name="DiT-XL/4", image_size=512, num_classes=7))
    assert (shape.depth, shape.width, shape.heads) == (28, 1152, 16)
    assert (shape.latent_size, shape.grid, shape.tokens, shape.patch_channels) == (64, 16, 256, 64)
    assert (shape.num_classes, shape.in_channels) == (7, 4)


@pytest.mark.parametrize("name", ["DiT-M/2", "XL/2", "DiT-XL", "DiT-XL/0", "DiT-XL/-2", "dit-xl/2"])
def test_unknown_name_lists_the_sizes(name):
    with pytest.raises(
        ConfigError, match=r"unknown model .*DiT-XL/2; sizes: DiT-Nano, DiT-Ti, DiT-S, DiT-B, DiT-L, DiT-XL"
    ):
        shape_of(ModelConfig(name=name))


@pytest.mark.parametrize(
    ("name", "image_size", "advice"),
    [
        ("DiT-XL/2", 250, "image_size 250 does not fit DiT-XL/2: expected a multiple of 16 .* 240 or 256"),
        ("DiT-S/8", 32, "expected a multiple of 64 .* for example 64"),
    ],
)
def test_image_size_that_is_no_multiple_of_the_patch(name, image_size, advice):
    with pytest.raises(ConfigError, match=advice):
        shape_of(ModelConfig(name=name, image_size=image_size))


def test_zoo_imports_no_torch():
    code = "import sys, dit_scale.models.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_printed_table_fits_80_columns(capsys):
    table.print_table(as_json=False, names=["DiT-S/8"])
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if "256" in line and "adaln_zero" in line]
    names = ["model", "px", "conditioning", "tokens", "parameters", "GMACs", "formula", "paper"]
    assert names in [line.split() for line in lines]
    shape = shape_of(ModelConfig(name="DiT-S/8"))
    assert line.split() == [
        *("DiT-S/8", "256", "adaln_zero", "16"),
        *(f"{num_parameters(shape):,}", "0.358", "same", "0.36"),
    ]
    assert max(map(len, lines)) <= 80
    assert "DIFFERS" not in "".join(lines)


def test_the_table_as_json(capsys):
    table.print_table(as_json=True, names=["DiT-Ti/8"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["image_size"], row["conditioning"]) for row in rows] == [
        (size, conditioning) for size in (256, 512) for conditioning in zoo.CONDITIONINGS
    ]
    shape = shape_of(ModelConfig(name="DiT-Ti/8"))
    assert rows[0]["parameters_with_pos_embed"] == num_parameters_with_pos_embed(shape)


@pytest.mark.parametrize("counted", ["parameters", "parameters_with_pos_embed", "forward_macs"])
def test_the_table_marks_a_count_that_differs_from_the_formula(counted, capsys, monkeypatch):
    row = table.count(ModelConfig(name="DiT-Ti/8"))
    monkeypatch.setattr(table, "rows", lambda names: iter([{**row, counted: row[counted] + 1}, row]))
    table.print_table(as_json=False, names=None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[6] for line in lines if "DiT-Ti/8" in line] == ["DIFFERS", "same"]


def test_progress_on_a_terminal_is_no_part_of_the_output(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich treat its output as a terminal
    row = table.count(ModelConfig(name="DiT-Ti/8"))
    monkeypatch.setattr(table, "rows", lambda names: iter([row]))
    table.print_table(as_json=True, names=None)
    out, err = capsys.readouterr()
    assert json.loads(out) == [row]
    assert "counting" in err


def test_rows_refuses_an_unknown_name_before_counting():
    with pytest.raises(ConfigError, match="unknown model 'DiT-M/2'"):
        table.rows(["DiT-Ti/8", "DiT-M/2"])


def test_an_unknown_name_is_refused_before_printing(capsys):
    with pytest.raises(ConfigError, match="unknown model 'DiT-M/2'"):
        table.print_table(as_json=True, names=["DiT-Ti/8", "DiT-M/2"])
    assert capsys.readouterr().out == ""
