"""The training-step benchmark runs and its figures are consistent; speed is not tested."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import train_step
from dit_scale.config import ModelConfig
from dit_scale.models.zoo import forward_macs, num_parameters, shape_of
from tests.support.speed import scaled

MODULE = "benchmarks.train_step"


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """Measure a backend that needs CUDA, then one that is always available."""
    command = [sys.executable, "-m", MODULE, "--smoke", "--json", "--attention", "sdpa_efficient,sdpa"]
    command += ["--steps", "15"]
    return subprocess.run(command, capture_output=True, text=True, timeout=scaled(300.0))


@pytest.fixture(scope="module")
def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_figures_are_positive_and_consistent(rows: list[dict[str, Any]]) -> None:
    row = rows[1]
    for figure in ("step_s", "images_per_s", "model_flops_per_s", "matmul_flops_per_s", "share_of_matmul"):
        assert row[figure] > 0, figure
    macs = forward_macs(shape_of(ModelConfig(name=row["model"], image_size=row["image_size"])))
    assert row["model_flops_per_image"] == 6 * macs
    assert row["images_per_s"] == pytest.approx(row["micro_batch"] * row["micro_steps"] / row["step_s"])
    assert row["model_flops_per_s"] == pytest.approx(row["images_per_s"] * row["model_flops_per_image"])
    assert row["share_of_matmul"] == pytest.approx(row["model_flops_per_s"] / row["matmul_flops_per_s"])


def test_a_log_point_of_the_same_steps_has_the_same_mfu_and_memory(rows: list[dict[str, Any]]) -> None:
    """The benchmark times the steps from outside, and asks the kernel for its memory in another way."""
    row, logged = rows[1], rows[1]["logged"]
    off = logged["mfu"] / row["share_of_matmul"] - 1
    peak_off = logged["memory_peak_gib"] * 2**30 / row["peak_memory_bytes"] - 1
    print(f"mfu differs by {off:+.2%}, peak memory by {peak_off:+.2%}")
    assert abs(off) < 0.02
    assert abs(peak_off) < 0.02
    assert 0 < logged["memory_gib"] <= logged["memory_peak_gib"]


def test_the_update_is_part_of_the_step_and_has_its_bytes(rows: list[dict[str, Any]]) -> None:
    row = rows[1]
    shape = shape_of(ModelConfig(name=row["model"], image_size=row["image_size"]))
    assert row["update_bytes"] == (28 + 12 + 6) * num_parameters(shape)  # one average, bf16 weights
    assert 0 < row["update_s"] < row["step_s"]
    share = row["update_bytes"] / row["update_s"] / row["copy_bytes_per_s"]
    assert row["update_share_of_copy"] == pytest.approx(share)
    assert row["predicted_memory_bytes"] > 16 * num_parameters(shape)


def test_settings_and_versions_are_in_the_row(rows: list[dict[str, Any]]) -> None:
    row = rows[1]
    assert (row["attention"], row["precision"]) == ("sdpa", "bf16")
    assert row["device"]
    assert row["versions"]["torch"] == torch.__version__
    assert {"python", "deepspeed", "cuda"} <= set(row["versions"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend is available with CUDA")
def test_a_missing_backend_has_a_row_with_the_reason(
    rows: list[dict[str, Any]], done: subprocess.CompletedProcess[str]
) -> None:
    assert done.returncode == 0
    assert rows[0]["attention"] == "sdpa_efficient"
    assert "needs a CUDA device" in rows[0]["problem"]
    assert "images_per_s" not in rows[0]
    assert "no figures" in done.stderr


def test_an_unknown_backend_is_refused_immediately(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.main(["--attention", "flash5"])
    assert "--attention flash5: expected `all`, or a list of sdpa" in capsys.readouterr().err


def test_a_backend_that_the_settings_exclude_has_a_row_with_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train_step.main(["--smoke", "--json", "--attention", "sdpa_cudnn"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert (row["attention"], row["determinism"]) == ("sdpa_cudnn", "strict")
    assert "use attention: sdpa, or engine.determinism=fast" in row["problem"]
