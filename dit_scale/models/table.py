"""`dit-scale models`: parameters and GMACs of the paper's models, counted two ways, with the paper's figures.

The first count is taken from the model: it is built on the meta device, and torch counts the matrix
products of a forward pass through one of its blocks, which counts for all. The second comes from the
formulas in `zoo`. A MAC is one multiply-add; the paper's "Gflops" are giga-MACs.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypedDict

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from dit_scale.config import ModelConfig
from dit_scale.models.dit import DiT, build
from dit_scale.models.zoo import (
    CONDITIONINGS,
    FLOPS_PER_MAC,
    PAPER_GMACS,
    PAPER_NAMES,
    Shape,
    forward_macs,
    num_parameters,
    num_parameters_with_pos_embed,
    shape_of,
)

IMAGE_SIZES = (256, 512)


class ModelRow(TypedDict):
    """One model at one image size with one conditioning design: both counts, and the paper's figure."""

    model: str
    image_size: int
    conditioning: str
    tokens: int
    parameters: int
    parameters_formula: int
    parameters_with_pos_embed: int
    parameters_with_pos_embed_formula: int
    forward_macs: int
    forward_macs_formula: int
    paper_gmacs: float | None


def rows(names: Sequence[str] | None = None) -> Iterator[ModelRow]:
    """Yield a row for each combination of model, image size and conditioning design.

    `names` are models such as DiT-XL/2; None selects the paper's twelve. Raises ConfigError for an
    unknown name before anything is counted.
    """
    configs = [
        ModelConfig(name=name, image_size=image_size, conditioning=conditioning)
        for name in (PAPER_NAMES if names is None else names)
        for image_size in IMAGE_SIZES
        for conditioning in CONDITIONINGS
    ]
    for config in configs:
        shape_of(config)
    return map(count, configs)


def count(config: ModelConfig) -> ModelRow:
    """Count the parameters and multiply-adds of one model."""
    model = build(config, seed=0, device="meta", initialise=False)
    shape = model.shape
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelRow(
        model=shape.name,
        image_size=shape.image_size,
        conditioning=shape.conditioning,
        tokens=shape.tokens,
        parameters=parameters,
        parameters_formula=num_parameters(shape),
        parameters_with_pos_embed=parameters + model.pos_embed.numel(),
        parameters_with_pos_embed_formula=num_parameters_with_pos_embed(shape),
        forward_macs=count_forward_macs(shape),
        forward_macs_formula=forward_macs(shape),
        paper_gmacs=PAPER_GMACS.get((shape.name, shape.image_size, shape.conditioning)),
    )


@torch.no_grad()
def count_forward_macs(shape: Shape) -> int:
    """Multiply-adds of one forward pass of one image, counted by torch during the pass.

    All blocks do the same work, so the pass has one block, which counts `depth` times.
    """
    with torch.device("meta"):
        model = DiT(replace(shape, depth=1))
        x_BCHW = torch.empty(1, shape.in_channels, shape.latent_size, shape.latent_size)
        index_B = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(x_BCHW, index_B, index_B)
    block = sum(counter.get_flop_counts()["DiT.blocks.0"].values())
    return (counter.get_total_flops() + (shape.depth - 1) * block) // FLOPS_PER_MAC


def print_table(as_json: bool, names: list[str] | None) -> None:
    """Print the rows as a table, or as a JSON list."""
    progress = track(rows(names), "counting", total=None, transient=True, console=Console(stderr=True))
    if as_json:
        print(json.dumps(list(progress), indent=2))
        return
    table = Table(
        title="Trainable parameters, and GMACs of one forward pass of one image",
        caption='formula: whether closed-form counts agree; paper: its "Gflops"',
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("model", "px", "conditioning"):
        table.add_column(column)
    for column in ("tokens", "parameters", "GMACs", "formula", "paper"):
        table.add_column(column, justify="right")
    for row in progress:
        table.add_row(*_cells(row))
    Console().print(table)


def _cells(row: ModelRow) -> list[str]:
    same = (
        row["parameters"] == row["parameters_formula"]
        and row["parameters_with_pos_embed"] == row["parameters_with_pos_embed_formula"]
        and row["forward_macs"] == row["forward_macs_formula"]
    )
    return [
        row["model"],
        str(row["image_size"]),
        row["conditioning"],
        str(row["tokens"]),
        f"{row['parameters']:,}",
        f"{row['forward_macs'] / 1e9:.3f}",
        "same" if same else "DIFFERS",
        "" if row["paper_gmacs"] is None else f"{row['paper_gmacs']:.2f}",
    ]
