"""The models of the paper: one table of sizes, and the shapes and costs that follow from it.

The paper is Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748; sizes and
published complexity are from its Tables 1 and 4 and its Figure 2. A MAC is one multiply-add; the paper's
"Gflops" are giga-MACs. This module does not import torch, which keeps the command line fast.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from dit_scale.config import ModelConfig
from dit_scale.errors import ConfigError

Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
CONDITIONINGS: tuple[Conditioning, ...] = get_args(Conditioning)

VAE_FACTOR = 8
"""Pixels per latent along one side: the VAE downsamples by 8."""
TIMESTEP_CHANNELS = 256
"""Channels of the timestep sinusoid, before its MLP."""
TIMESTEP_DIVISORS = {"paper": TIMESTEP_CHANNELS // 2, "diffusers": TIMESTEP_CHANNELS // 2 - 1}
"""Divisor of the exponent in the sinusoid's frequencies, by `model.timestep_embedding`."""
MLP_RATIO = 4
"""Ratio of the MLP's hidden width to the model's width."""
FLOPS_PER_MAC = 2
TRAINING_FORWARDS = 3
"""Cost of a training step in forward passes: one forward, two for backward, recomputation not counted."""


class ModelSize(NamedTuple):
    """Depth, width and heads of one model size; the patch size is independent of it."""

    depth: int
    width: int
    heads: int


SIZES = {
    "Nano": ModelSize(2, 64, 2),  # not in the paper: for tests
    "Ti": ModelSize(6, 128, 4),  # not in the paper: for laptops
    "S": ModelSize(12, 384, 6),
    "B": ModelSize(12, 768, 12),
    "L": ModelSize(24, 1024, 16),
    "XL": ModelSize(28, 1152, 16),
}

PAPER_NAMES = tuple(f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (8, 4, 2))
"""The twelve models of Table 4, in the paper's order."""

PAPER_GMACS: dict[tuple[str, int, Conditioning], float] = {
    ("DiT-S/8", 256, "adaln_zero"): 0.36,
    ("DiT-S/4", 256, "adaln_zero"): 1.41,
    ("DiT-S/2", 256, "adaln_zero"): 6.06,
    ("DiT-B/8", 256, "adaln_zero"): 1.42,
    ("DiT-B/4", 256, "adaln_zero"): 5.56,
    ("DiT-B/2", 256, "adaln_zero"): 23.01,
    ("DiT-L/8", 256, "adaln_zero"): 5.01,
    ("DiT-L/4", 256, "adaln_zero"): 19.70,
    ("DiT-L/2", 256, "adaln_zero"): 80.71,
    ("DiT-XL/8", 256, "adaln_zero"): 7.39,
    ("DiT-XL/4", 256, "adaln_zero"): 29.05,
    ("DiT-XL/2", 256, "adaln_zero"): 118.64,
    ("DiT-XL/2", 512, "adaln_zero"): 524.60,
    ("DiT-XL/2", 256, "adaln"): 118.56,
    ("DiT-XL/2", 256, "cross_attention"): 137.62,
    ("DiT-XL/2", 256, "in_context"): 119.37,
}
"""Published complexity by (name, image size, conditioning)."""


@dataclass(frozen=True)
class Shape:
    """Everything that determines the shapes of a model's tensors."""

    name: str
    depth: int
    width: int
    heads: int
    patch: int
    image_size: int
    conditioning: Conditioning
    num_classes: int
    in_channels: int = 4

    @property
    def latent_size(self) -> int:
        """Side of the latent, in latent pixels."""
        return self.image_size // VAE_FACTOR

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.latent_size // self.patch

    @property
    def tokens(self) -> int:
        """Patches per image."""
        return self.grid**2

    @property
    def extra_tokens(self) -> int:
        """Tokens besides the patches: timestep and class, in the in-context design."""
        return 2 if self.conditioning == "in_context" else 0

    @property
    def patch_channels(self) -> int:
        """Latent values per patch."""
        return self.in_channels * self.patch**2

    @property
    def modulation_chunks(self) -> int:
        """Vectors of `width` that a block regresses from its conditioning (Section 3.2 of the paper)."""
        return {"adaln_zero": 6, "adaln": 4}.get(self.conditioning, 0)

    @property
    def final_modulation_chunks(self) -> int:
        """Vectors of `width` that the final layer regresses: shift and scale in the adaLN designs."""
        return 2 if self.modulation_chunks else 0


def shape_of(config: ModelConfig) -> Shape:
    """Return the shape of the model that a configuration describes, for example DiT-XL/2 at 256 pixels.

    Raises ConfigError for an unknown name, or an image size that is not a multiple of 8 x patch.
    """
    match = re.fullmatch(r"DiT-([A-Za-z]+)/([1-9][0-9]*)", config.name)
    if match is None or match[1] not in SIZES:
        sizes = ", ".join(f"DiT-{size}" for size in SIZES)
        raise ConfigError(
            f"unknown model {config.name!r}; expected SIZE/PATCH, for example DiT-XL/2; sizes: {sizes}"
        )
    patch = int(match[2])
    _check_image_size(config.image_size, patch, config.name)
    return Shape(
        name=config.name,
        **SIZES[match[1]]._asdict(),
        patch=patch,
        image_size=config.image_size,
        conditioning=config.conditioning,
        num_classes=config.num_classes,
    )


def _check_image_size(image_size: int, patch: int, name: str) -> None:
    step = VAE_FACTOR * patch
    if image_size % step == 0:
        return
    below = image_size // step * step
    near = f"{below} or {below + step}" if below else f"{step}"
    raise ConfigError(
        f"image_size {image_size} does not fit {name}: expected a multiple of {step} "
        f"(VAE downsampling {VAE_FACTOR} x patch {patch}), for example {near}"
    )


def num_parameters(shape: Shape) -> int:
    """Number of trainable parameters, from the definition of the layers."""
    width = shape.width
    patch_embed = shape.patch_channels * width + width
    timestep_mlp = (TIMESTEP_CHANNELS + 1) * width + (width + 1) * width
    label_table = (shape.num_classes + 1) * width
    attention = 4 * (width + 1) * width
    mlp = 2 * MLP_RATIO * width**2 + (MLP_RATIO + 1) * width
    cross_attention = attention if shape.conditioning == "cross_attention" else 0
    block = attention + cross_attention + mlp + shape.modulation_chunks * (width + 1) * width
    out = 2 * shape.patch_channels
    final = (width + 1) * out + shape.final_modulation_chunks * (width + 1) * width
    return patch_embed + timestep_mlp + label_table + shape.depth * block + final


def num_parameters_with_pos_embed(shape: Shape) -> int:
    """Number of values in the published state dict, which includes the fixed position embedding."""
    return num_parameters(shape) + shape.tokens * shape.width


def forward_macs(shape: Shape) -> int:
    """Multiply-adds of every matrix product in one forward pass of one image.

    Counted: patch embedding, timestep MLP, modulation, qkv, QK^T, PV, projections, MLP, final layer.
    """
    width, context = shape.width, shape.tokens + shape.extra_tokens
    patch_embed = shape.tokens * shape.patch_channels * width
    timestep_mlp = TIMESTEP_CHANNELS * width + width**2
    block = _block_macs(shape, context) + shape.modulation_chunks * width**2
    final = shape.tokens * width * 2 * shape.patch_channels + shape.final_modulation_chunks * width**2
    return patch_embed + timestep_mlp + shape.depth * block + final


def _block_macs(shape: Shape, context: int) -> int:
    width = shape.width
    attention = 4 * context * width**2 + 2 * context**2 * width
    mlp = 2 * MLP_RATIO * context * width**2
    if shape.conditioning != "cross_attention":
        return attention + mlp
    # Query and output projections of every token; key and value of the two conditioning tokens; QK^T, PV.
    cross_attention = 2 * context * width**2 + 2 * 2 * width**2 + 2 * 2 * context * width
    return attention + cross_attention + mlp
