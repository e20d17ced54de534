"""The benchmark of a GPU runs every part in its short form on a CPU, and keeps what a failed part printed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import PARTS, main
from tests.support.speed import scaled


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--budgets", str(scaled(1.0))]
    subprocess.run([*command, "--out", str(folder)], check=True, timeout=scaled(600.0))
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "bench.json").read_text())
    return found


def test_every_part_has_figures_and_its_command(report: dict[str, Any]) -> None:
    assert list(report["parts"]) == list(PARTS)
    for name, part in report["parts"].items():
        assert part["command"].startswith(f"python -m benchmarks.{PARTS[name].module} --smoke"), name
        assert any(row.get("images_per_s", row.get("us", 0)) > 0 for row in part["rows"]), name
    assert {"python", "torch", "deepspeed", "cuda"} <= report["versions"].keys()
    assert report["device"]
    assert "driver" in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend is available with CUDA")
def test_a_row_that_fails_has_the_reason_beside_those_with_figures(report: dict[str, Any], out: Path) -> None:
    cudnn, math = report["parts"]["attention"]["rows"]
    assert cudnn["problem"]
    assert math["images_per_s"] > 0
    table = (out / "bench.md").read_text()
    assert "| attention | sdpa_cudnn | no figures | " in table
    assert table.count("\n| ") - 1 == sum(len(part["rows"]) for part in report["parts"].values())


def test_a_part_that_exceeds_its_budget_has_the_reason(tmp_path: Path) -> None:
    code = main(["--smoke", "--parts", "sample", "--budgets", "0.001", "--out", str(tmp_path)])
    part = json.loads((tmp_path / "bench.json").read_text())["parts"]["sample"]
    assert code == 1
    assert part["rows"] == [{"problem": "stopped after its budget of 0 s; --budgets multiplies it"}]


def test_the_budgets_end_within_ten_minutes() -> None:
    assert sum(part.budget_s for part in PARTS.values()) < 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_cuda_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "torch sees no CUDA device; use --smoke" in capsys.readouterr().err
