"""The benchmark of collectives prints a row per collective with the bytes of the model."""

import json
import subprocess
import sys


def test_it_prints_a_row_per_collective() -> None:
    command = [sys.executable, "-m", "benchmarks.collectives", "--smoke"]
    rows = [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]
    assert [row["collective"] for row in rows] == ["all-reduce", "all-gather"]
    assert len({row["bytes"] for row in rows}) == 1
    assert all(row["ms"] > 0 for row in rows)
