"""The work of one encoder: uint8 crops in, fp16 posterior moments of both views out.

Shapes: B images, V = 2 views (image, its mirror), C latent channels, H W pixels, h w latents.
"""

import logging
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dit_scale.config import EncodeConfig
from dit_scale.data.shards import VaeIdentity
from dit_scale.errors import DeviceError, WeightsError

if TYPE_CHECKING:
    from dit_scale.vae import Vae

VIEWS = ("image", "mirror")
_log = logging.getLogger(__name__)


class Encoder:
    """A VAE that is loaded at the first call, and again after a restart of the process."""

    def __init__(self, config: EncodeConfig, identity: VaeIdentity, device: str) -> None:
        self._config, self._identity, self._device = config, identity, device

    @cached_property
    def _precision(self) -> str:
        import torch

        from dit_scale.dist import SLOW_BF16, choose_precision, multiplies_bf16

        device = torch.device(self._device)
        if self._config.precision == "bf16" and not multiplies_bf16(device):
            _log.warning("precision bf16: %s", SLOW_BF16)
        return choose_precision(self._config.precision, device)

    @cached_property
    def _vae(self) -> "Vae":
        import torch

        from dit_scale import dist, host_memory, vae

        host_memory.use_huge_pages()
        dist.compute_on_cpu(self._config.threads_per_encoder)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self._precision]
        loaded = vae.load(
            self._config.vae, self._device, dtype, self._config.channels_last, self._config.compile
        )
        if loaded.identity().weights_sha256 != self._identity.weights_sha256:
            raise WeightsError(
                f"the VAE {self._config.vae} differs between nodes: its weights have SHA-256 "
                f"{loaded.identity().weights_sha256[:12]} here and {self._identity.weights_sha256[:12]} "
                "where the job was started; copy the same weights to all nodes"
            )
        return loaded

    @cached_property
    def _runtime(self) -> dict[str, str]:
        from dit_scale import vae

        return {
            "device": vae.device_kind(self._vae.device),
            "precision": self._precision,
            "torch": version("torch"),
            "diffusers": version("diffusers"),
            "pillow": version("pillow"),
        }

    def runtime(self) -> dict[str, str]:
        """Return the device and library versions, on which the bits of latents depend."""
        return self._runtime

    def encode(self, pixels_BHW3: npt.NDArray[np.uint8], runtime: dict[str, str]) -> npt.NDArray[np.float16]:
        """Pixels of at most `vae_batch` images => moments (B, V, 2C, h, w).

        The VAE always gets `vae_batch` images: a short batch is padded with black ones. Raises DeviceError
        when the runtime differs, because Ray may restart an encoder on another kind of node.
        """
        import torch

        if self._runtime != runtime:
            raise DeviceError(
                f"an encoder was restarted with a different device or library version: {self._runtime}, the "
                f"data set is made with {runtime}. Start again on identical nodes; finished shards are kept"
            )
        num_images = len(pixels_BHW3)
        padded = np.zeros((self._config.vae_batch, *pixels_BHW3.shape[1:]), np.uint8)
        padded[:num_images] = pixels_BHW3
        # [0, 255] => [-1, 1] in two steps as in the paper, which round slightly differently from one step.
        x_BHW3 = torch.from_numpy(padded).to(self._vae.device).float().div(255).sub(0.5).div(0.5)
        x_B3HW = x_BHW3.permute(0, 3, 1, 2).contiguous()
        views = [self._vae.encode(x_B3HW), self._vae.encode(x_B3HW.flip(3))]
        return torch.stack(views, dim=1)[:num_images].half().cpu().numpy()
