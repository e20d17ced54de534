"""Encode pixels to latents and decode latents to pixels with diffusers' AutoencoderKL, without autocast.

Images are RGB in [-1, 1]. The diffusion model sees scaled latents, z = scale * latent, with scale 0.18215 for
the VAE of Stable Diffusion.

Shapes: B batch, C latent channels, H W pixels, h w = H/8 W/8 latents.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_scale.data.shards import LatentDataset, VaeIdentity
from dit_scale.errors import WeightsError
from dit_scale.vae_files import VaeFiles, find_vae, require_weights

LOGVAR_RANGE = (-30.0, 20.0)
"""Clamp of the posterior's log variance, as in every Stable Diffusion encoder."""
PIXELS_PER_PASS = 2**20
"""Pixels that one pass of the decoder makes: 16 images of 256 pixels, or 4 of 512."""
FIXED_CHOICES = {"deterministic": True}
"""Options of torch.compile: what may change bits is chosen by rules, and not by timing kernels on the device,
whose result may differ between processes."""


class Vae:
    """A frozen VAE on a device. It encodes a batch in one pass, without sampling, and decodes in slices."""

    def __init__(
        self,
        files: VaeFiles,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        channels_last: bool,
        compile: bool,
    ) -> None:
        from diffusers import AutoencoderKL

        self.device = torch.device(device)
        self.dtype = dtype
        self._files = files
        try:
            model = AutoencoderKL.from_pretrained(
                files.folder,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                torch_dtype=dtype,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise WeightsError(f"cannot load the VAE in {files.folder}: {error}") from error
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._model = model.to(self.device, memory_format=self._format).eval().requires_grad_(False)
        if compile:
            self._model.encoder.compile(dynamic=False, options=FIXED_CHOICES)
        self.scale = files.identity.scale

    def identity(self) -> VaeIdentity:
        """Name, SHA-256 of the weights file, scale and geometry."""
        return self._files.identity

    def require_weights(self, sha256: str | None) -> None:
        """Raise WeightsError unless this is the VAE with these weights; None accepts any VAE."""
        require_weights(self.identity(), sha256)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Encode images in [-1, 1] => posterior mean, then std (B, 2C, h, w), fp32 and unscaled."""
        with plain_convolutions():
            x_B3HW = images_B3HW.to(self.device, self.dtype, memory_format=self._format)
            posterior = self._model.encode(x_B3HW).latent_dist
        mean_BChw, logvar_BChw = posterior.parameters.float().chunk(2, dim=1)
        std_BChw = torch.exp(0.5 * logvar_BChw.clamp(*LOGVAR_RANGE))
        return torch.cat([mean_BChw, std_BChw], dim=1)

    @torch.no_grad()
    def decode(self, z_BChw: Tensor) -> Tensor:
        """Decode scaled latents => (B, H, W, 3) uint8 images: clamp(127.5 x + 128, 0, 255), truncated.

        The decoder's activations are hundreds of times larger than the latents, so it runs on slices; only
        the finished images of all slices are in memory together.
        """
        factor = self.identity().downsample
        limit = images_per_pass(z_BChw.shape[2] * factor, z_BChw.shape[3] * factor)
        slices = z_BChw.tensor_split(-(-len(z_BChw) // limit))
        return torch.cat([self._pixels(z_NChw) for z_NChw in slices])

    def _pixels(self, z_NChw: Tensor) -> Tensor:
        pixels_N3HW = (127.5 * self.reconstruct(z_NChw) + 128.0).clamp(0, 255).to(torch.uint8)
        return pixels_N3HW.permute(0, 2, 3, 1).contiguous()

    @torch.no_grad()
    def reconstruct(self, z_BChw: Tensor) -> Tensor:
        """Decode scaled latents in one pass => (B, 3, H, W) fp32, about -1 to 1."""
        with plain_convolutions():
            z_BChw = (z_BChw / self.scale).to(self.device, self.dtype, memory_format=self._format)
            x_B3HW: Tensor = self._model.decode(z_BChw).sample
        return x_B3HW.float()


def load(
    name_or_folder: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    compile: bool = False,
) -> Vae:
    """Load a VAE from a folder or a hub name; safetensors only.

    `channels_last` selects the layout that tensor cores read without a copy; `compile` compiles the encoder
    for the shape of its first batch. Both change the last bits of latents and pixels. Raises WeightsError if
    the VAE is missing or cannot be loaded.
    """
    return Vae(find_vae(name_or_folder), device, dtype, channels_last=channels_last, compile=compile)


def load_decoder(dataset: LatentDataset, name_or_folder: str | None, device: torch.device) -> Vae:
    """Load the VAE that made a data set, by default the one that dataset.json names.

    Raises WeightsError if the VAE is unavailable, or has other weights than the one that made the latents.
    """
    made_by = dataset.info.vae
    if name_or_folder is None and "/" not in made_by.name and not Path(made_by.name).is_dir():
        # A hub name contains a "/"; for a folder, dataset.json stores only the last path component.
        raise WeightsError(
            f"{dataset.storage.url} was made by a VAE in a folder named {made_by.name!r} (weights sha256 "
            f"{made_by.weights_sha256[:12]}); pass that folder with --vae"
        )
    decoder = load(name_or_folder or made_by.name, device)
    decoder.require_weights(made_by.weights_sha256)
    return decoder


def images_per_pass(height: int, width: int) -> int:
    """Return how many images of this size one pass of the decoder may make; at least 3.

    A batch is split evenly, so with a limit of 3, no slice has a single image unless the batch has. Products
    of a single image take other kernels than those of several and differ in the last bits.
    """
    return max(3, PIXELS_PER_PASS // (height * width))


def device_kind(device: torch.device | str) -> str:
    """Return what determines a device's arithmetic: the GPU model, or the CPU's vector instructions."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def plain_convolutions() -> Any:
    """Disable algorithm search and TF32, so that every CUDA process computes the same bits."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
