"""The door to diffusers' AutoencoderKL: pixels to latents and back, without autocast.

Shapes: B batch, C latent channels, H W pixels, h w = H/8 W/8 latents. Images are RGB in [-1, 1];
latents inside the diffusion model are scaled, z = scale * latent (0.18215 for Stable Diffusion's).
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_scale.data.shards import VaeIdentity
from dit_scale.errors import WeightsError

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LOGVAR_RANGE = (-30.0, 20.0)
"""The posterior's log variance is clamped so by every Stable Diffusion encoder."""


class VaeFiles:
    """An AutoencoderKL on disk, not built yet."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.name = name
        try:
            self.config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        except ValueError as error:
            raise WeightsError(f"{folder / CONFIG} is not JSON: {error}") from None
        if self.config.get("_class_name") != "AutoencoderKL":
            found = self.config.get("_class_name", "nothing of the kind")
            raise WeightsError(f"{folder / CONFIG}: expected an AutoencoderKL, got {found}")
        if self.config.get("shift_factor") is not None:
            raise WeightsError(f"{folder}: its latents are shifted; expected one of Stable Diffusion's kind")

    @cached_property
    def identity(self) -> VaeIdentity:
        """Name, SHA-256 of the weights file, scale and geometry."""
        with open(self.folder / WEIGHTS, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return VaeIdentity(
            name=self.name,
            weights_sha256=sha256,
            scale=float(self.config.get("scaling_factor", 0.18215)),
            downsample=2 ** (len(self.config["block_out_channels"]) - 1),
            latent_channels=int(self.config["latent_channels"]),
        )


def find(name_or_folder: str) -> VaeFiles:
    """The files of a folder, or of a hub name (cached or downloaded); WeightsError says what lacks.

    A folder goes by its last component, so that a data set does not remember one machine's paths.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise WeightsError(
                f"the VAE folder {folder} has no {' and no '.join(missing)}; expected what "
                "AutoencoderKL.save_pretrained(folder, safe_serialization=True) writes "
                "(in a pipeline's download that is its vae/ folder; .bin and .ckpt are not read)"
            )
        return VaeFiles(folder.absolute().name, folder)
    return VaeFiles(name_or_folder, _download(name_or_folder))


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        try:
            files = [Path(hf_hub_download(name, file, local_files_only=True)) for file in (CONFIG, WEIGHTS)]
        except LocalEntryNotFoundError:
            files = [Path(hf_hub_download(name, file)) for file in (CONFIG, WEIGHTS)]
    except HFValidationError:
        raise WeightsError(
            f"no VAE at {name!r}: neither a folder nor a hub name like 'stabilityai/sd-vae-ft-ema'"
        ) from None
    except Exception as error:
        # The hub's client raises many kinds: no network, no such repository, no such file, no permission.
        raise WeightsError(
            f"no VAE at {name!r}: not a folder, and the hub did not give {CONFIG} and {WEIGHTS} "
            f"({type(error).__name__}). Without network: run "
            f"`hf download {name} {CONFIG} {WEIGHTS} --local-dir DIR` where there is one, "
            "copy DIR here and set vae=DIR"
        ) from error
    return files[0].parent


class Vae:
    """A frozen autoencoder on a device; batches go through as they are, nothing is random."""

    def __init__(self, files: VaeFiles, device: torch.device | str, dtype: torch.dtype) -> None:
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
        self._model = model.to(self.device).eval().requires_grad_(False)
        self.scale = files.identity.scale

    def identity(self) -> VaeIdentity:
        """Name, SHA-256 of the weights file, scale and geometry."""
        return self._files.identity

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Images in [-1, 1] => posterior mean, then standard deviation (B, 2C, h, w); fp32, unscaled."""
        with _plain_convolutions():
            posterior = self._model.encode(images_B3HW.to(self.device, self.dtype)).latent_dist
        mean_BChw, logvar_BChw = posterior.parameters.float().chunk(2, dim=1)
        std_BChw = torch.exp(0.5 * logvar_BChw.clamp(*LOGVAR_RANGE))
        return torch.cat([mean_BChw, std_BChw], dim=1)

    @torch.no_grad()
    def decode(self, z_BChw: Tensor) -> Tensor:
        """Scaled latents => uint8 images (B, H, W, 3): clamp(127.5 x + 128, 0, 255), truncated."""
        with _plain_convolutions():
            x_B3HW = self._model.decode((z_BChw / self.scale).to(self.device, self.dtype)).sample
        pixels = (127.5 * x_B3HW.float() + 128.0).clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous()


def load(name_or_folder: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Vae:
    """The autoencoder in a folder or under a hub name; safetensors only."""
    return Vae(find(name_or_folder), device, dtype)


def device_kind(device: torch.device | str) -> str:
    """What makes the arithmetic of a device: the GPU's name, or the CPU's vector instructions."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def _plain_convolutions() -> Any:
    """No algorithm search and no TF32: on CUDA the same batch then gives the same bits in every process."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
