"""The training objective of a micro-batch: random draws, noising, the model, the hybrid loss.

Every draw is keyed by the sample's position, so the loss of a sample does not depend on the rank or
micro-step that computes it.

Shapes: B micro-batch, C latent channels, H latent height, W latent width.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dit_scale import rng
from dit_scale.data.micro_batch import MicroBatch, draw_latents
from dit_scale.diffusion.gaussian import q_sample
from dit_scale.diffusion.loss import HybridLoss, hybrid_loss
from dit_scale.diffusion.schedule import Schedule
from dit_scale.rng import Purpose

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


class SampleLosses(NamedTuple):
    """The losses of each sample of a micro-batch, fillers included; fp32."""

    total_B: Tensor
    """The hybrid loss."""
    mse_B: Tensor
    """Mean squared error of the predicted noise."""
    vb_B: Tensor
    """The timestep's term of the variational bound, in bits per element."""
    t_B: Tensor
    """Timesteps drawn, int64."""

    def sums(self, weight_B: Tensor) -> Tensor:
        """Weighted sums (total, mse, vb) over the samples, fp32 (3,); the gradient flows through [0]."""
        return torch.stack((self.total_B, self.mse_B, self.vb_B)) @ weight_B


MicroBatchObserver = Callable[[MicroBatch, SampleLosses], None]
"""Receives each micro-batch and the losses of its samples."""


def drop_labels(y_B: Tensor, position_B: Tensor, null_class: int, share: float, seed: int) -> Tensor:
    """Replace a random `share` of the labels by the null class, for classifier-free guidance (int64)."""
    return torch.where(rng.uniforms(seed, Purpose.LABEL_DROP, position_B) < share, null_class, y_B)


@cache
def compiled_loss() -> Callable[..., HybridLoss]:
    """The hybrid loss under torch.compile: a tenth of its kernels, equal up to rounding."""
    return torch.compile(hybrid_loss, dynamic=False)


def losses(
    predict: Predict,
    schedule: Schedule,
    batch: MicroBatch,
    *,
    seed: int,
    latent_scale: float,
    null_class: int,
    label_dropout: float,
    compile_loss: bool = False,
) -> SampleLosses:
    """Compute the losses of each sample of a micro-batch; the gradient flows through `total_B`."""
    z_BCHW = draw_latents(batch, seed, latent_scale)
    t_B = rng.integers(seed, Purpose.TIMESTEP, batch.position_B, len(schedule.timesteps))
    noise_BCHW = rng.normals(seed, Purpose.NOISE, batch.position_B, tuple(z_BCHW.shape[1:]))
    y_B = drop_labels(batch.y_B, batch.position_B, null_class, label_dropout, seed)
    x_BCHW = q_sample(schedule, z_BCHW, t_B, noise_BCHW)
    loss_of = compiled_loss() if compile_loss else hybrid_loss
    loss = loss_of(
        schedule,
        predict(x_BCHW, t_B, y_B),
        x_start_BCHW=z_BCHW,
        x_t_BCHW=x_BCHW,
        noise_BCHW=noise_BCHW,
        t_B=t_B,
    )
    return SampleLosses(*loss, t_B)
