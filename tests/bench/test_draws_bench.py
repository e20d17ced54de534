"""The benchmark of the draws compares equal numbers and prints a row per draw."""

import subprocess
import sys

import torch

from benchmarks import draws


def test_both_versions_draw_the_same() -> None:
    for plain, selected in draws.cases(torch.arange(3)).values():
        assert torch.equal(plain(), selected())


def test_it_prints_a_row_per_draw() -> None:
    command = [sys.executable, "-m", "benchmarks.draws", "--batch", "2", "--repeats", "1"]
    output = subprocess.check_output(command, text=True)
    assert "numpy instead of torch" in output
    assert all(name in output for name in draws.cases(torch.arange(2)))
