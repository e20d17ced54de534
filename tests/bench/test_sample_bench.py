"""The sampling benchmark runs, its figures are consistent, and its usual loop computes the same steps."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import sample
from dit_scale import rng
from dit_scale.config import ModelConfig
from dit_scale.models.dit import build
from dit_scale.sampling.denoise import denoise, sampling_schedule
from dit_scale.sampling.settings import SamplingSettings
from tests.support.speed import scaled


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.sample", "--smoke", "--compile", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(300.0), check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_figures_are_positive_and_consistent(rows: list[dict[str, Any]]) -> None:
    assert [row["steps"] for row in rows] == 2 * [250, 250, 250, 250, 20]
    assert rows[0]["ratio"] == rows[5]["ratio_to_compiled"] == 1
    assert [row["loop"] for row in rows[5:]] == [f"{row['loop']}, compiled" for row in rows[:5]]
    for row in rows:
        assert row["step_s"] > 0
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["steps"] / row["step_s"])
        assert row["ratio"] == pytest.approx(row["images_per_s"] / rows[0]["images_per_s"])
        assert row["ratio_to_compiled"] == pytest.approx(row["images_per_s"] / rows[5]["images_per_s"])
        assert row["versions"]["torch"] == torch.__version__


def test_both_loops_compute_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(ModelConfig(name="DiT-Nano/2", image_size=32, num_classes=10), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # the initial output is zero
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    y_B, shape = torch.tensor([3, 7]), (2, 4, 4, 4)
    settings = SamplingSettings(steps="10", guidance=sample.GUIDANCE)
    schedule = sampling_schedule(1000, settings, "cpu")

    def normals(_: int, purpose: rng.Purpose, __: object, ___: object, stream: int = 0) -> torch.Tensor:
        number = stream if purpose == rng.Purpose.SAMPLE_STEP else 100
        return torch.randn(shape, generator=torch.Generator().manual_seed(number))

    start_BCHW = normals(0, rng.Purpose.SAMPLE_START, None, None)
    noises = [normals(0, rng.Purpose.SAMPLE_STEP, None, None, step) for step in range(10)]
    noises_DCHW = iter([torch.cat([noise_BCHW, noise_BCHW]) for noise_BCHW in noises])
    monkeypatch.setattr(rng, "normals", normals)
    ours = list(denoise(model, schedule, y_B, torch.arange(2), settings))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: start_BCHW)
    monkeypatch.setattr(torch, "randn_like", lambda _: next(noises_DCHW))
    for ours_BCHW, usual_DCHW in zip(ours, sample.usual_ddpm(model, 10, y_B), strict=True):
        limit = 1e-5 * float(ours_BCHW.abs().max())
        torch.testing.assert_close(ours_BCHW, usual_DCHW[:2], rtol=0, atol=limit)
