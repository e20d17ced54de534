"""The side-by-side benchmark runs every loop, and its baselines compute what ours computes."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.peers import original
from benchmarks.peers.loops import LOOPS
from dit_scale.config import ModelConfig
from dit_scale.diffusion.gaussian import q_sample
from dit_scale.diffusion.loss import hybrid_loss
from dit_scale.diffusion.schedule import linear
from dit_scale.models.dit import build
from dit_scale.models.zoo import shape_of
from tests.support.speed import scaled

CONFIG = ModelConfig(name="DiT-Nano/2", image_size=32, num_classes=10)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, int], dict[str, Any]]:
    """Measure every kind of loop, one of them by two processes, and one that does not exist."""
    command = [sys.executable, "-m", "benchmarks.peers", "--smoke", "--json", "--precision", "bf16"]
    loops = [name for name in LOOPS if name not in ("zero1", "zero3")] + ["other"]
    done = subprocess.run(
        [*command, "--loops", *loops, "--processes", "1", "2"],
        capture_output=True,
        text=True,
        timeout=scaled(300.0),
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["loop"], row["processes"]): row for row in found}


@pytest.mark.dist
def test_every_loop_has_figures_or_a_reason(rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    problems = {key: row["problem"] for key, row in rows.items() if "problem" in row}
    assert problems.keys() == {("reference", 1), ("other", 1)}
    assert "needs a checkout of the published code" in problems["reference", 1]
    assert "unknown loop 'other'; expected one of original, " in problems["other", 1]
    assert set(rows) - problems.keys() == {(name, 1) for name in ("original", "fast", "bare", "zero2")} | {
        ("zero2", 2)
    }


@pytest.mark.dist
def test_figures_are_consistent(rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    for (loop, processes), row in rows.items():
        if "problem" in row:
            continue
        assert row["images_per_s"] == pytest.approx(processes * row["batch"] / row["step_s"]), loop
        assert row["cpu_s"] > 0, loop
        assert row["times_original_cpu"] > 0, loop
    assert rows["original", 1]["times_original"] == rows["bare", 1]["times_bare_cpu"] == 1.0


def test_the_original_model_and_loss_are_ours() -> None:
    model = build(CONFIG, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # leave the initial zeros
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    theirs = original.OriginalDiT(shape_of(CONFIG)).eval()
    theirs.load_state_dict(model.state_dict())
    z_BCHW = torch.randn(6, 4, 4, 4, generator=generator)
    noise_BCHW = torch.randn(z_BCHW.shape, generator=generator)
    t_B, y_B = torch.tensor([0, 1, 10, 400, 900, 999]), torch.tensor([0, 3, 10, 1, 9, 5])

    schedule = linear(1000)
    x_BCHW = q_sample(schedule, z_BCHW, t_B, noise_BCHW)
    output_B2CHW = model(x_BCHW, t_B, y_B)
    loss = hybrid_loss(
        schedule, output_B2CHW, x_start_BCHW=z_BCHW, x_t_BCHW=x_BCHW, noise_BCHW=noise_BCHW, t_B=t_B
    )
    loss.total_B.mean().backward()
    torch.testing.assert_close(theirs(x_BCHW, t_B, y_B), output_B2CHW)
    their_B = original.Diffusion().training_losses(theirs, z_BCHW, t_B, y_B, noise_BCHW)
    torch.testing.assert_close(their_B, loss.total_B, rtol=1e-4, atol=1e-4)
    their_B.mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            theirs.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=name
        )


def test_recomputation_changes_no_gradient() -> None:
    weights = build(CONFIG, seed=0).state_dict()
    x_BCHW, t_B, y_B = torch.ones(2, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([1, 2])
    gradients = []
    for recompute in (False, True):
        model = original.OriginalDiT(shape_of(CONFIG), recompute).eval()
        model.load_state_dict(weights)
        model(x_BCHW, t_B, y_B).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_the_ema_covers_every_tensor() -> None:
    model, ema = (original.OriginalDiT(shape_of(CONFIG)) for _ in range(2))
    before = {name: p.detach().clone() for name, p in ema.named_parameters()}
    original.update_ema(ema, model)
    for name, parameter in model.named_parameters():
        expected = before[name].lerp(parameter.detach(), 1 - original.EMA_DECAY)
        torch.testing.assert_close(ema.get_parameter(name).detach(), expected, msg=name)


@pytest.mark.dist
def test_the_overhead_of_the_loop_is_measured_in_a_real_run() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.peers.overhead",
        "--steps",
        "30",
        "--log-every",
        "10",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(120.0), check=True)
    (line,) = done.stdout.splitlines()
    row = json.loads(line)
    assert row["steps"] == 27  # without a tenth as warm-up
    assert 0 < row["batch_s"] < row["loop_s"] < row["loop_log_point_s"]
    assert row["trainer_s"] > 0
    assert "step 30/30" in done.stderr
