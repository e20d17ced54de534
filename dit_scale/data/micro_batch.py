"""A micro-batch of one rank, and the latents drawn from it.

Shapes: B micro-batch, C latent channels, H and W latent sides.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_scale import rng
from dit_scale.rng import Purpose


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass of a rank."""

    moments_B2CHW: Tensor
    """Posterior mean (first C channels) and standard deviation of the drawn view, unscaled, fp16."""
    y_B: Tensor
    """Class labels, int64."""
    position_B: Tensor
    """Global positions, int64: the key of every random draw for these samples."""
    weight_B: Tensor
    """1 for a sample of this step, 0 for padding, fp32."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to the device asynchronously."""

        def move(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        return MicroBatch(
            move(self.moments_B2CHW), move(self.y_B), move(self.position_B), move(self.weight_B)
        )


def draw_latents(batch: MicroBatch, seed: int, scale: float) -> Tensor:
    """z_BCHW = scale * (mean + std * noise), fp32: one draw from each sample's VAE posterior."""
    mean_BCHW, std_BCHW = batch.moments_B2CHW.float().chunk(2, dim=1)
    noise_BCHW = rng.normals(seed, Purpose.POSTERIOR, batch.position_B, tuple(mean_BCHW.shape[1:]))
    return (mean_BCHW + std_BCHW * noise_BCHW) * scale
