"""Feature networks, each named "KIND:PATH" on command lines and in configurations."""

from collections.abc import Callable
from pathlib import Path

import torch

from dit_scale.errors import ConfigError
from dit_scale.evaluate.features import FeatureNetwork
from dit_scale.evaluate.networks.classifier import ClassifierNetwork
from dit_scale.evaluate.networks.dinov2 import Dinov2Network
from dit_scale.evaluate.networks.inception import InceptionNetwork, unverified

_Loader = Callable[[Path, torch.device], FeatureNetwork]

_LOADERS: dict[str, _Loader] = {
    "inception": InceptionNetwork,
    "inception-unverified": unverified,
    "dinov2": Dinov2Network,
    "classifier": ClassifierNetwork,
}

EXPECTED = "inception:FILE.pth, inception-unverified:FILE.pth, dinov2:FOLDER or classifier:FILE.safetensors"
"""The forms of a specification, for help texts and errors."""


def load_network(spec: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Load the feature network "KIND:PATH" on a device.

    Raises ConfigError for another kind, WeightsError if the weights are missing, damaged or not those of the
    network.
    """
    kind, _, path = spec.partition(":")
    if kind not in _LOADERS or not path:
        raise ConfigError(f"no feature network {spec!r}; expected {EXPECTED}")
    return _LOADERS[kind](Path(path).expanduser(), torch.device(device))
