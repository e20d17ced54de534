"""Locate, check and identify the files of an AutoencoderKL, in a folder or on the hub, without torch."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from dit_scale.data.shards import VaeIdentity
from dit_scale.errors import WeightsError

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


class VaeFiles:
    """The configuration and weights file of an AutoencoderKL on disk."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.name = name
        try:
            self.config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        except ValueError as error:
            raise WeightsError(f"{folder / CONFIG} is not JSON: {error}") from None
        if self.config.get("_class_name") != "AutoencoderKL":
            got = self.config.get("_class_name", "no _class_name")
            raise WeightsError(f"{folder / CONFIG}: expected an AutoencoderKL, got {got}")
        if self.config.get("shift_factor") is not None:
            raise WeightsError(f"{folder}: expected a VAE without shift_factor, as in Stable Diffusion")

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


def find_vae(name_or_folder: str) -> VaeFiles:
    """Locate a VAE in a folder, or under a hub name (cached or downloaded).

    The identity of a VAE in a folder has only the last path component as its name, so that a data set does
    not contain paths of one machine. Raises WeightsError if a file is missing or not an AutoencoderKL.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise WeightsError(
                f"the VAE folder {folder} has no {' and no '.join(missing)}; expected the files that "
                "AutoencoderKL.save_pretrained(folder, safe_serialization=True) writes; in a downloaded "
                "pipeline, use its vae/ subfolder (.bin and .ckpt files are not supported)"
            )
        return VaeFiles(folder.absolute().name, folder)
    return VaeFiles(name_or_folder, _download(name_or_folder))


def require_weights(identity: VaeIdentity, sha256: str | None) -> None:
    """Raise WeightsError unless this VAE has these weights; None accepts any VAE."""
    if sha256 is not None and identity.weights_sha256 != sha256:
        raise WeightsError(
            f"this VAE ({identity.name}, sha256 {identity.weights_sha256[:12]}) did not make the latents "
            f"(sha256 {sha256[:12]}); pass the VAE that did with --vae"
        )


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
            f"no VAE at {name!r}: neither a folder nor a hub name such as 'stabilityai/sd-vae-ft-ema'"
        ) from None
    except Exception as error:
        # The hub client has many exceptions: no network, no such repository or file, no permission.
        raise WeightsError(
            f"no VAE at {name!r}: not a folder, and {CONFIG} and {WEIGHTS} cannot be downloaded from the hub "
            f"({type(error).__name__}). Without a network connection: run "
            f"`hf download {name} {CONFIG} {WEIGHTS} --local-dir DIR` on another machine, "
            "copy DIR here and set vae=DIR"
        ) from error
    return files[0].parent
