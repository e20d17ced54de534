"""What a feature network says of images, and what it takes to be one.

Shapes: N images, H W pixels, F pooled features, S spatial features, C classes.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Features of N images, fp32."""

    pool_NF: Tensor
    """Features of the whole image: those of the Frechet distance, KID, precision and recall."""
    spatial_NS: Tensor | None = None
    """Features that keep their place in the image, for sFID; None if the network has none."""
    probabilities_NC: Tensor | None = None
    """Class probabilities for the Inception Score; None if the network has none."""


@dataclass(frozen=True)
class NetworkIdentity:
    """Everything about a network that its features depend on. Two references with it are comparable."""

    name: str
    weights_sha256: str
    preprocessing: str
    """Resize and value range, in words."""
    precision: str = "fp32"


class FeatureNetwork(Protocol):
    """A frozen network on a device."""

    identity: NetworkIdentity

    def __call__(self, images_NHW3: Tensor) -> Features:
        """Return the features of uint8 images of any size, on the device of the network."""
        ...
