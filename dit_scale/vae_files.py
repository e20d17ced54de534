"""The files of an AutoencoderKL: found in a folder or on the hub, checked, identified; imports no torch."""

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


def find_vae(name_or_folder: str) -> VaeFiles:
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
