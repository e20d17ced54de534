"""The table of micro-batches and GiB is that of the estimate, and its micro-batches are the largest."""

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import memory
from dit_scale.train.memory import GIB

COMMAND = [sys.executable, "-m", "benchmarks.memory", "--models", "DiT-XL/2", "--image-sizes", "256"]


def output(*options: str) -> str:
    return subprocess.check_output([*COMMAND, *options], text=True)


def test_the_largest_micro_batch_is_followed_by_one_that_does_not_fit() -> None:
    results: list[dict[str, Any]] = [json.loads(line) for line in output("--json").splitlines()]
    assert [result["mode"] for result in results] == list(memory.MODES)
    for result in results:
        case = memory.Case(result["model"], result["image_size"], result["stage"], result["world"])
        config = memory.configured(case, result["mode"], ["engine.precision=bf16", "engine.device=cuda"])
        for card_gb, largest in result["largest_micro_batch"].items():
            limit = int(card_gb) * 10**9
            assert memory.needed(config, 8, largest, 1).on_device <= limit
            assert memory.needed(config, 8, largest + 1, 1).on_device > limit


def test_the_table_has_a_row_per_case_and_names_what_is_rejected() -> None:
    printed = output("--stages", "2", "3", "--worlds", "1", "8", "--micro-batch", "32")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "DiT-" in line
    ]
    assert [row[2] for row in rows] == ["in one process", "at ZeRO-2, 8 GPUs", "at ZeRO-3, 8 GPUs"]
    assert rows[2][4:7] == ["-", "-", "-"]
    config = memory.configured(
        memory.Case("DiT-XL/2", 256, 2, 8), "none", ["engine.precision=bf16", "engine.device=cuda"]
    )
    assert float(rows[1][3]) == pytest.approx(memory.needed(config, 8, 32, 1).on_device / GIB, abs=0.05)


def test_an_override_counts() -> None:
    def gib(*overrides: str) -> list[str]:
        return output("--micro-batch", "1", *overrides).splitlines()

    assert gib("evaluate.every_steps=5000") != gib()
