"""The benchmark of the draws compares equal numbers and prints a row per draw."""

import json
import subprocess
import sys

import torch

from benchmarks import draws


def test_both_versions_draw_the_same() -> None:
    for plain, selected in draws.cases(torch.arange(3)).values():
        assert torch.equal(plain(), selected())


def test_it_prints_a_row_per_draw() -> None:
    command = [sys.executable, "-m", "benchmarks.draws", "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["draw"] for row in rows] == list(draws.cases(torch.arange(2)))
    assert all(row["us"] > 0 and row["plain_us"] > 0 for row in rows)
    assert "numpy instead of torch" in done.stderr
