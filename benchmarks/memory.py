"""The largest micro-batch that fits a card, or the memory that one needs: by model, sharding and mode.

    python -m benchmarks.memory                                          # micro-batches at ZeRO-2 on 8 GPUs
    python -m benchmarks.memory --models DiT-XL/2 --micro-batch 32 --stages 1 2 3 --worlds 1 2 8
    python -m benchmarks.memory --micro-steps 4 evaluate.every_steps=5000

Nothing is measured: the figures are the estimates of `dit_scale/train/memory.py`, in bf16 on CUDA unless
overridden. They do not include what the allocator holds without using it. A card of N GB has N x 10^9 bytes.
`--json` prints one object per cell.
"""

import argparse
import json
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from dit_scale.config import TrainConfig, load
from dit_scale.data.batch_plan import batch_plan
from dit_scale.errors import ConfigError
from dit_scale.models.zoo import shape_of
from dit_scale.train.memory import GIB, Memory, estimate, sharding

MODELS = ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2")
CARDS_GB = (24, 48, 80, 141)
LARGEST = 65536
"""Larger micro-batches are not tried."""
MODES = {
    "none": ("none", False),
    "none, compiled": ("none", True),
    "selective": ("selective", False),
    "selective, compiled": ("selective", True),
    "block": ("block", False),
}
"""Column => `engine.activation_checkpointing` and `engine.compile_blocks`."""


class Case(NamedTuple):
    """A row of the table."""

    model: str
    image_size: int
    stage: int
    world: int


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    parser.add_argument("--models", nargs="+", default=MODELS, help=f"(default {' '.join(MODELS)})")
    parser.add_argument("--image-sizes", nargs="+", type=int, default=(256, 512), help="(default 256 512)")
    parser.add_argument("--stages", nargs="+", type=int, default=(2,), help="ZeRO stages (default 2)")
    parser.add_argument("--worlds", nargs="+", type=int, default=(8,), help="numbers of GPUs (default 8)")
    parser.add_argument("--micro-steps", type=int, default=1, help="(default 1)")
    parser.add_argument("--micro-batch", type=int, help="show the GiB of this micro-batch")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args()
    cases = list(rows(args.models, args.image_sizes, args.stages, args.worlds))
    overrides = ["engine.precision=bf16", "engine.device=cuda", *args.overrides]
    if args.json:
        for case, mode in product(cases, MODES):
            print(json.dumps(cell(case, mode, overrides, args.micro_steps, args.micro_batch)))
        return 0
    show(cases, overrides, args.micro_steps, args.micro_batch)
    return 0


def rows(models: list[str], image_sizes: list[int], stages: list[int], worlds: list[int]) -> Iterator[Case]:
    """Yield the cases; one process has no stage, so it is one case."""
    for model, image_size, world in product(models, image_sizes, worlds):
        for stage in stages if world > 1 else stages[:1]:
            yield Case(model, image_size, stage, world)


def cell(
    case: Case, mode: str, overrides: list[str], micro_steps: int, micro_batch: int | None
) -> dict[str, Any]:
    """Describe a case in a mode: its bytes by part, or the largest micro-batch by card.

    Both are missing if the configuration rejects the mode.
    """
    result: dict[str, Any] = {**case._asdict(), "mode": mode}
    try:
        config = configured(case, mode, overrides)
    except ConfigError as error:
        return {**result, "rejected": str(error)}
    if micro_batch is not None:
        memory = needed(config, case.world, micro_batch, micro_steps)
        return {**result, "micro_batch": micro_batch, **asdict(memory), "on_device": memory.on_device}
    largest = {
        str(card): largest_micro_batch(config, case.world, micro_steps, card * 10**9) for card in CARDS_GB
    }
    return {**result, "largest_micro_batch": largest}


def configured(case: Case, mode: str, overrides: list[str]) -> TrainConfig:
    """Return the configuration of a case. Raises ConfigError if it rejects the mode."""
    checkpointing, compiled = MODES[mode]
    knobs = {
        "model.name": case.model,
        "model.image_size": case.image_size,
        "engine.zero_stage": case.stage,
        "engine.activation_checkpointing": checkpointing,
        "engine.compile_blocks": str(compiled).lower(),
    }
    return load(TrainConfig, None, [*overrides, *(f"{key}={value}" for key, value in knobs.items())])


def needed(config: TrainConfig, world: int, micro_batch: int, micro_steps: int) -> Memory:
    """Estimate the memory of a process with this micro-batch."""
    plan = batch_plan(micro_batch * micro_steps * world, micro_batch, world)
    return estimate(config, shape_of(config.model), plan)


def largest_micro_batch(config: TrainConfig, world: int, micro_steps: int, limit_bytes: int) -> int:
    """Return the largest micro-batch, up to LARGEST, whose estimate is within the limit; 0 if none is."""
    return bisect_right(
        range(1, LARGEST + 1),
        limit_bytes,
        key=lambda micro_batch: needed(config, world, micro_batch, micro_steps).on_device,
    )


def show(cases: list[Case], overrides: list[str], micro_steps: int, micro_batch: int | None) -> None:
    """Print the table as Markdown."""
    table = Table(box=box.MARKDOWN)
    for column in ("model", "px", "sharing", *MODES):
        table.add_column(column, no_wrap=True)
    for case in cases:
        sharing = sharding(case.stage, case.world)
        where = f"{sharing}, {case.world} GPUs" if case.world > 1 else sharing
        cells = (_text(cell(case, mode, overrides, micro_steps, micro_batch)) for mode in MODES)
        table.add_row(case.model, str(case.image_size), where, *cells)
    cards = " / ".join(map(str, CARDS_GB))
    print(
        f"GiB of a process with a micro-batch of {micro_batch}"
        if micro_batch is not None
        else f"largest micro-batch on cards of {cards} GB"
    )
    Console(width=200).print(table)


def _text(result: dict[str, Any]) -> str:
    if "rejected" in result:
        return "-"
    if "on_device" in result:
        return f"{result['on_device'] / GIB:.1f}"
    return " / ".join(map(str, result["largest_micro_batch"].values()))


if __name__ == "__main__":
    sys.exit(main())
