"""The hybrid loss against an independent float64 implementation, and where its gradients flow."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_scale.diffusion.gaussian import q_sample
from dit_scale.diffusion.loss import HybridLoss, hybrid_loss
from dit_scale.diffusion.schedule import linear, respace

FULL = linear(1000)
SHORT = respace(FULL, "250")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(schedule, t_B, output_scale, seed=0):
    """Return (output_B2CHW, x_start, x_t, noise, t_B): noised latents and an imperfect prediction."""
    batch = len(t_B)
    x_start, noise = randn(batch, 4, 3, 3, seed=seed), randn(batch, 4, 3, 3, seed=seed + 1)
    v = randn(batch, 4, 3, 3, seed=seed + 2)
    eps = noise + output_scale * randn(batch, 4, 3, 3, seed=seed + 3)
    return torch.cat([eps, v], dim=1), x_start, q_sample(schedule, x_start, t_B, noise), noise, t_B


def loss_of(schedule, output, x_start, x_t, noise, t_B):
    return hybrid_loss(schedule, output, x_start_BCHW=x_start, x_t_BCHW=x_t, noise_BCHW=noise, t_B=t_B)


def float64_loss(betas, output, x_start, x_t, noise, t):
    """Return (mse, bits) of one sample, from variances instead of their logs and from the means of eq. 11.

    Everything is derived from the betas, without the package.
    """
    output, x_start, x_t, noise = (tensor.double().numpy() for tensor in (output, x_start, x_t, noise))
    eps, v = output[:4], output[4:]
    alpha_bars = np.cumprod(1 - betas)
    s = max(t, 1)  # the posterior variance at t = 0 is 0, so t = 1 replaces it
    posterior_variance = betas[s] * (1 - alpha_bars[s - 1]) / (1 - alpha_bars[s])
    variance_p = betas[t] ** ((v + 1) / 2) * posterior_variance ** ((1 - v) / 2)

    def mean_given(noise):
        return (x_t - betas[t] / np.sqrt(1 - alpha_bars[t]) * noise) / np.sqrt(1 - betas[t])

    mean_p = mean_given(eps)
    if t > 0:
        mean_q = mean_given(noise)
        nats = 0.5 * (
            np.log(variance_p / posterior_variance)
            + (posterior_variance + (mean_q - mean_p) ** 2) / variance_p
            - 1
        )
    else:

        def cdf(x):
            return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

        std = np.sqrt(variance_p)
        upper, lower = cdf((x_start - mean_p + 1 / 255) / std), cdf((x_start - mean_p - 1 / 255) / std)
        upper = np.where(x_start > 0.999, 1, upper)
        lower = np.where(x_start < -0.999, 0, lower)
        nats = -np.log(np.maximum(upper - lower, 1e-12))
    return np.mean((noise - eps) ** 2), np.mean(nats) / np.log(2)


@pytest.mark.parametrize("output_scale", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("schedule", [FULL, SHORT], ids=["1000", "250"])
def test_loss_equals_the_float64_implementation_at_every_timestep(schedule, output_scale):
    t_B = torch.arange(len(schedule))
    batch = example(schedule, t_B, output_scale)
    loss = loss_of(schedule, *batch)
    rows = [float64_loss(schedule.betas_float64, *row[:-1], int(row[-1])) for row in zip(*batch, strict=True)]
    mse_B, vb_B = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
    torch.testing.assert_close(loss.mse_B.double(), mse_B, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss.vb_B.double(), vb_B, rtol=2e-4, atol=2e-6)
    # The full bound is the sum of one term in bits per element per timestep.
    assert loss.vb_B.double().sum().item() == pytest.approx(vb_B.sum().item(), rel=2e-5)
    torch.testing.assert_close(loss.total_B, loss.mse_B + loss.vb_B, rtol=0, atol=0)


def test_an_all_zero_output_has_a_loss_of_1_016():
    """The published runs start at 1.016: the mean square of the noise, plus 0.016 bits for uniform t."""
    t_B = torch.arange(1000).repeat(8)
    _, *rest = example(FULL, t_B, 0.0)
    loss = loss_of(FULL, torch.zeros(8000, 8, 3, 3), *rest)
    assert loss.mse_B.mean().item() == pytest.approx(1.0, abs=0.01)
    assert loss.vb_B.mean().item() == pytest.approx(0.016, abs=0.001)
    assert loss.total_B.mean().item() == pytest.approx(1.016, abs=0.01)


def test_the_bound_is_not_rescaled():
    """With v = 1 and the true noise, the KL is that of two known variances: by hand at t = 1."""
    t_B = torch.tensor([1])
    output, *rest = example(FULL, t_B, 0.0)
    output[:, 4:] = 1.0
    ratio = 5.4531876613e-05 / FULL.betas_float64[1]
    bits = 0.5 * (ratio - 1 - math.log(ratio)) / math.log(2)
    assert loss_of(FULL, output, *rest).vb_B.item() == pytest.approx(bits, rel=1e-5)


def test_a_perfect_prediction_leaves_only_the_decoder_term():
    t_B = torch.tensor([0, 1, 500, 999])
    output, *rest = example(FULL, t_B, 0.0)
    output[:, 4:] = -1.0
    loss = loss_of(FULL, output, *rest)
    assert loss.mse_B.tolist() == [0, 0, 0, 0]
    assert loss.vb_B[0] > 0.1
    torch.testing.assert_close(loss.vb_B[1:], torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_each_term_has_gradients_only_in_its_own_channels(t):
    output, *rest = example(FULL, torch.tensor([t, t]), 0.01)

    def gradient_of(term):
        leaf = output.clone().requires_grad_()
        getattr(loss_of(FULL, leaf, *rest), term).mean().backward()
        return leaf.grad

    mse, vb, total = (gradient_of(term) for term in ("mse_B", "vb_B", "total_B"))
    assert (mse[:, 4:] == 0).all()
    assert (vb[:, :4] == 0).all()
    assert (mse[:, :4] != 0).all()
    assert (vb[:, 4:] != 0).any()
    torch.testing.assert_close(total, mse + vb, rtol=0, atol=0)
    # d mse / d eps computed directly: 2 (eps - noise) / number of elements.
    torch.testing.assert_close(mse[:, :4], 2 * (output[:, :4] - rest[2]) / rest[2].numel())


def test_gradient_of_the_bound_is_its_slope():
    t_B = torch.tensor([3, 500])
    output, *rest = example(FULL, t_B, 0.3)
    leaf = output.clone().requires_grad_()
    loss_of(FULL, leaf, *rest).vb_B.sum().backward()
    step = torch.zeros_like(output)
    step[:, 4:] = 1e-2
    higher = loss_of(FULL, output + step, *rest).vb_B.sum()
    lower = loss_of(FULL, output - step, *rest).vb_B.sum()
    slope = ((higher - lower) / 2e-2).item()
    assert leaf.grad[:, 4:].sum().item() == pytest.approx(slope, rel=2e-3)


def test_a_large_early_prediction_has_finite_gradients():
    t_B = torch.tensor([0, 1, 999])
    output, *rest = example(FULL, t_B, 30.0)
    leaf = output.clone().requires_grad_()
    loss_of(FULL, leaf, *rest).total_B.sum().backward()
    assert torch.isfinite(leaf.grad).all()


def test_samples_are_independent():
    t_B = torch.tensor([0, 7, 999])
    batch = example(FULL, t_B, 0.5)
    together = loss_of(FULL, *batch)
    alone = [loss_of(FULL, *(tensor[i : i + 1] for tensor in batch)) for i in range(3)]
    expected = HybridLoss(*(torch.cat(parts) for parts in zip(*alone, strict=True)))
    torch.testing.assert_close(together, expected, rtol=1e-6, atol=1e-7)


def test_a_bf16_output_is_reduced_in_fp32():
    t_B = torch.tensor([0, 7, 999])
    output, *rest = example(FULL, t_B, 0.5)
    loss = loss_of(FULL, output.bfloat16(), *rest)
    assert all(part.dtype == torch.float32 for part in loss)
    torch.testing.assert_close(loss, loss_of(FULL, output.bfloat16().float(), *rest), rtol=0, atol=0)


class CountHostReads(TorchDispatchMode):
    """Counts tensors whose value is brought to Python, which waits for the device on CUDA."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_loss_and_its_gradient_do_not_synchronize_the_host():
    t_B = torch.tensor([0, 7, 999])
    output, *rest = example(FULL, t_B, 0.5)
    leaf = output.clone().requires_grad_()
    with CountHostReads() as counter:
        loss_of(FULL, leaf, *rest).total_B.mean().backward()
        assert counter.reads == 0
        t_B[0].item()
        assert counter.reads == 1
