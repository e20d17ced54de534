"""DINOv2 as a feature network: the Frechet distance that the field moves to (FD-DINOv2, arXiv 2306.04675).

    dinov2:FOLDER    config.json and model.safetensors, usually of facebook/dinov2-large (ViT-L/14)

Features are the class token after the last normalization. Preprocessing is that of dgm-eval, the code of that
paper: Pillow's bicubic resize to 224 x 224, mean and standard deviation of ImageNet.

Shapes: B N images, H W pixels, P positions with that of the class token first, D width.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from dit_scale.errors import ConfigError, WeightsError
from dit_scale.evaluate.features import Features, NetworkIdentity
from dit_scale.evaluate.networks.files import file_sha256
from dit_scale.evaluate.networks.precision import PRECISION, plain_fp32

INPUT_SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
POSITION_OFFSET = 0.1
"""Added to the number of patches per side where the published code resamples its position embeddings."""
CONFIG = "config.json"
WEIGHTS = "model.safetensors"


class Dinov2Network:
    """A DINOv2 vision transformer on a device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        model = _load(folder)
        config = model.config
        positions = model.embeddings.position_embeddings
        model.embeddings.position_embeddings = nn.Parameter(
            resample_positions(positions.detach(), INPUT_SIZE // config.patch_size)
        )
        self.model = model.to(device).eval().requires_grad_(False)
        size = f"{config.num_hidden_layers} layers of {config.hidden_size}, patch {config.patch_size}"
        self.identity = NetworkIdentity(
            name=f"dinov2, {size}",
            weights_sha256=file_sha256(folder / WEIGHTS),
            preprocessing=f"Pillow bicubic to {INPUT_SIZE} x {INPUT_SIZE}, mean and std of ImageNet",
            precision=PRECISION,
        )

    def __call__(self, images_NHW3: Tensor) -> Features:
        """Return the normalized class token of uint8 images."""
        x_N3HW = to_input(images_NHW3)
        with plain_fp32(self.device):
            return Features(pool_NF=self.model(x_N3HW.to(self.device)).pooler_output)


def to_input(images_NHW3: Tensor) -> Tensor:
    """Resize uint8 images and normalize their channels => (N, 3, 224, 224) fp32 on the CPU."""
    size = (INPUT_SIZE, INPUT_SIZE)
    resized = [
        np.asarray(Image.fromarray(pixels_HW3).resize(size, Image.Resampling.BICUBIC))
        for pixels_HW3 in images_NHW3.cpu().numpy()
    ]
    x_NHW3 = torch.from_numpy(np.stack(resized)).float() / 255
    x_NHW3 = (x_NHW3 - torch.tensor(MEAN)) / torch.tensor(STD)
    return x_NHW3.permute(0, 3, 1, 2).contiguous()


def resample_positions(table_1PD: Tensor, side: int) -> Tensor:
    """Resample a table of position embeddings to `side` x `side` patches, as the published code does.

    That code samples at steps of old / (side + 0.1), transformers at old / side; the first is what published
    distances were computed with.
    """
    old = math.isqrt(table_1PD.shape[1] - 1)
    if old == side:
        return table_1PD
    class_11D, patches_1PD = table_1PD[:, :1], table_1PD[:, 1:]
    grid_1DHW = patches_1PD.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    scale = (side + POSITION_OFFSET) / old
    resampled_1DHW = functional.interpolate(grid_1DHW, scale_factor=(scale, scale), mode="bicubic")
    assert resampled_1DHW.shape[2:] == (side, side)
    return torch.cat([class_11D, resampled_1DHW.flatten(2).transpose(1, 2)], dim=1)


def _load(folder: Path) -> Any:
    """Load the Dinov2Model of transformers, whose types are too loose to check."""
    _require_dinov2(folder)
    try:
        from transformers import Dinov2Model
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError(
            f"dinov2:{folder} needs the package transformers ({error}); pip install 'dit-scale[dinov2]'"
        ) from None
    logging.disable_progress_bar()
    try:
        loaded: Any = Dinov2Model.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,
            attn_implementation="eager",
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"cannot load the DINOv2 in {folder}: {error}") from error
    model, report = loaded
    # Without this check, a missing tensor would keep its random initial value.
    problems = {what: sorted(map(str, names)) for what, names in report.items() if names}
    if problems:
        raise WeightsError(
            f"{folder / WEIGHTS} does not match {CONFIG}: {problems}; download both files again"
        )
    return model


def _require_dinov2(folder: Path) -> None:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"{folder} has no {' and no '.join(missing)}; expected a folder as made by "
            f"`hf download facebook/dinov2-large {CONFIG} {WEIGHTS} --local-dir DIR`"
        )
    try:
        kind = json.loads((folder / CONFIG).read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{folder / CONFIG} is no configuration ({error}); download it again") from None
    if kind != "dinov2":
        raise WeightsError(f"{folder / CONFIG}: expected model_type 'dinov2', got {kind!r}")
