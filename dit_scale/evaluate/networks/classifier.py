"""A small convolutional classifier of our own: a feature network for image sets that Inception does not fit.

    classifier:demo/classifier.safetensors

One safetensors file holds the weights and, as metadata, the architecture and the classes. The features are
the last hidden layer, what the class logits are a linear function of. demo/train_classifier.py trains one.

Shapes: B N images, H W pixels, S side of the network's input, F hidden features, C classes.
"""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from dit_scale import weights
from dit_scale.errors import WeightsError
from dit_scale.evaluate.features import Features, NetworkIdentity
from dit_scale.evaluate.networks.files import file_sha256
from dit_scale.evaluate.networks.precision import PRECISION, plain_fp32

METADATA_KEY = "dit-scale classifier, version 1"
"""The only key of the metadata; its value is the architecture. Of several keys the order would be random."""
KERNEL = 3


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a classifier's weights follow from."""

    classes: tuple[str, ...]
    input_size: PositiveInt = 32
    """Side to which images are resized."""
    channels: tuple[PositiveInt, ...] = (12, 24, 32)
    """Output channels of the convolutions; each halves the side."""
    hidden: PositiveInt = 64
    """Number of features."""


class SmallClassifier(nn.Module):
    """Strided 3 x 3 convolutions, a hidden layer, a linear layer; SiLU between them."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        widths = (3, *architecture.channels)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(narrow, wide, KERNEL, stride=2, padding=KERNEL // 2)
            for narrow, wide in pairwise(widths)
        )
        side = architecture.input_size // 2 ** len(architecture.channels)
        self.hidden = nn.Linear(widths[-1] * side * side, architecture.hidden)
        self.output = nn.Linear(architecture.hidden, len(architecture.classes))

    def forward(self, x_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden features (B, F) and class logits (B, C) of images in [-1, 1]."""
        x = x_B3SS
        for convolution in self.convolutions:
            x = functional.silu(convolution(x))
        hidden_BF = functional.silu(self.hidden(x.flatten(1)))
        return hidden_BF, self.output(hidden_BF)


def to_input(images_NHW3: Tensor, input_size: int) -> Tensor:
    """Resize uint8 images by a bilinear filter with antialias => (N, 3, S, S) fp32 in [-1, 1]."""
    x_N3HW = images_NHW3.permute(0, 3, 1, 2).float()
    size = (input_size, input_size)
    return functional.interpolate(x_N3HW, size, mode="bilinear", antialias=True).div(127.5).sub(1)


class ClassifierNetwork:
    """A trained classifier as a feature network on a device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.device = device
        self.model = read(path).to(device).eval().requires_grad_(False)
        size = self.model.architecture.input_size
        self.identity = NetworkIdentity(
            name="classifier",
            weights_sha256=file_sha256(path),
            preprocessing=f"bilinear with antialias to {size} x {size}, x / 127.5 - 1",
            precision=PRECISION,
        )

    def __call__(self, images_NHW3: Tensor) -> Features:
        """Return the last hidden layer and the class probabilities of uint8 images."""
        with plain_fp32(self.device):
            x_N3SS = to_input(images_NHW3.to(self.device), self.model.architecture.input_size)
            hidden_NF, logits_NC = self.model(x_N3SS)
            return Features(pool_NF=hidden_NF, probabilities_NC=logits_NC.softmax(dim=1))


def write(model: SmallClassifier, path: Path) -> None:
    """Write a classifier to a safetensors file, atomically."""
    metadata = {METADATA_KEY: json.dumps(asdict(model.architecture))}
    weights.write(model.state_dict(), path, metadata)


def read(path: Path) -> SmallClassifier:
    """Read a classifier. Raises WeightsError if the file is missing, damaged or of another kind."""
    state = weights.read(path)
    metadata = weights.read_metadata(path)
    if METADATA_KEY not in metadata:
        raise WeightsError(
            f"{path}: expected a safetensors file with {METADATA_KEY!r} in its metadata, got "
            f"{metadata or 'no metadata'}; make one with demo/train_classifier.py"
        )
    model = SmallClassifier(_architecture(metadata[METADATA_KEY], path))
    weights.load_into(model, state)
    return model


def _architecture(text: str, path: Path) -> Architecture:
    try:
        return TypeAdapter(Architecture).validate_json(text)
    except ValidationError as error:
        raise WeightsError(
            f"{path}: its metadata describe no classifier ({error}); write the file again"
        ) from None
