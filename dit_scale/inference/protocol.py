"""The protocol of a sample folder: everything that the pixels of its images depend on."""

import dataclasses
from importlib.metadata import version
from typing import Any, Literal

import torch

from dit_scale import __version__, vae, weights
from dit_scale.data.shards import VaeIdentity
from dit_scale.inference.sources import WeightsSource
from dit_scale.sampling.labels import LabelChoice
from dit_scale.sampling.sample_folder import FORMAT, VERSION
from dit_scale.sampling.settings import SamplingSettings

ROUNDING = "clamp(127.5 x + 128, 0, 255), truncated"
"""How `Vae.decode` turns a pixel in [-1, 1] into uint8."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the VAE decodes. Every choice but the default changes pixels."""

    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    """Whether to use the layout that tensor cores read without a copy."""


def protocol_of(
    source: WeightsSource,
    decoder: VaeIdentity,
    decoding: Decoding,
    *,
    num_images: int,
    labels: LabelChoice,
    settings: SamplingSettings,
    device: torch.device,
    precision: str,
    compiled: bool,
) -> dict[str, Any]:
    """Describe the samples; two folders with equal protocols hold equal images, byte for byte.

    The description of the weights and the name of the VAE are informational.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "images": num_images,
        "image_size": source.model.image_size,
        "weights": {
            "description": source.description,
            "sha256": weights.digest(source.state, {}),
            "ema": source.ema,
            "step": source.step,
        },
        "model": source.model.model_dump(mode="json"),
        "timesteps": source.timesteps,
        "sampling": dataclasses.asdict(settings),
        "labels": labels.protocol(),
        "vae": {
            "name": decoder.name,
            "weights_sha256": decoder.weights_sha256,
            "scale": decoder.scale,
            **dataclasses.asdict(decoding),
            "images_per_pass": vae.images_per_pass(source.model.image_size, source.model.image_size),
        },
        "rounding": ROUNDING,
        "precision": precision,
        "compiled": compiled,
        "device": _device_of(device),
        "versions": {
            "dit_scale": __version__,
            "torch": version("torch"),
            "diffusers": version("diffusers"),
        },
    }


def _device_of(device: torch.device) -> str:
    """Return the kind of device; on a CPU the number of threads changes the last bits, too."""
    kind, threads = vae.device_kind(device), torch.get_num_threads()
    return kind if device.type != "cpu" or threads == 1 else f"{kind}, {threads} threads"
