"""Inception as a feature network: weights known by their digest, preprocessing as in TensorFlow's graph.

    inception:pt_inception-2015-12-05-6726825d.pth
    inception-unverified:FILE.pth              weights with another digest; comparable only with themselves

Shapes: N images, H W pixels, F = 2048 pooled and S = 2023 spatial features, C = 1008 classes.
"""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from dit_scale import weights
from dit_scale.errors import WeightsError
from dit_scale.evaluate.features import Features, NetworkIdentity
from dit_scale.evaluate.networks.files import file_sha256
from dit_scale.evaluate.networks.inception_layers import INPUT_SIZE, InceptionV3
from dit_scale.evaluate.networks.precision import PRECISION, plain_fp32
from dit_scale.evaluate.networks.tf_resize import resize_bilinear_tf1

NAME = "inception-2015-12-05"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_BYTES = 95_628_359
PUBLISHED_FILES = (
    "pt_inception-2015-12-05-6726825d.pth of pytorch-fid "
    "(torch-fidelity's weights-inception-2015-12-05-6726825d.pth is the same file)"
)
PREPROCESSING = f"TensorFlow 1 bilinear to {INPUT_SIZE} x {INPUT_SIZE} without antialias, (x - 128) / 128"

_NUM_NAMED = 3


class InceptionNetwork:
    """Inception on a device. Pooled features, sFID's features, class probabilities."""

    def __init__(self, path: Path, device: torch.device, *, is_verified: bool = True) -> None:
        self.device = device
        sha256 = file_sha256(path)
        _refuse_programs(path)
        if is_verified and sha256 != WEIGHTS_SHA256:
            raise WeightsError(
                f"{path} has SHA-256 {sha256} ({path.stat().st_size:,} bytes), expected {WEIGHTS_SHA256} "
                f"({WEIGHTS_BYTES:,} bytes), {PUBLISHED_FILES}; download it again. Scores with other weights "
                f"are comparable only with each other; to use these anyway: inception-unverified:{path}"
            )
        self.model = _load(path).to(device).eval().requires_grad_(False)
        self.identity = NetworkIdentity(
            name=NAME if is_verified else f"{NAME} with unverified weights",
            weights_sha256=sha256,
            preprocessing=PREPROCESSING,
            precision=PRECISION,
        )

    def __call__(self, images_NHW3: Tensor) -> Features:
        """Return pool_3, the features of sFID in NHWC order, and class probabilities of uint8 images."""
        with plain_fp32(self.device):
            pool_NF, spatial_NHWC = self.model(to_input(images_NHW3.to(self.device)))
            # IS has no bias because the first code of Salimans et al. (2016) multiplied by the weights only.
            logits_NC = pool_NF @ self.model.fc.weight.T
            return Features(
                pool_NF=pool_NF,
                spatial_NS=spatial_NHWC.flatten(1),
                probabilities_NC=logits_NC.softmax(dim=1),
            )


def unverified(path: Path, device: torch.device) -> InceptionNetwork:
    """Load weights of the published layout with any digest. Raises WeightsError if names or shapes differ."""
    return InceptionNetwork(path, device, is_verified=False)


def to_input(images_NHW3: Tensor) -> Tensor:
    """Resize uint8 images as TensorFlow's graph does => (N, 3, 299, 299) fp32 in [-1, 1)."""
    x_N3HW = images_NHW3.permute(0, 3, 1, 2).float()
    return (resize_bilinear_tf1(x_N3HW, INPUT_SIZE, INPUT_SIZE) - 128) / 128


def _refuse_programs(path: Path) -> None:
    """Raise WeightsError for a TorchScript program, such as StyleGAN's inception-2015-12-05.pt."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            raise WeightsError(
                f"{path} is a TorchScript program, whose code cannot be checked; expected weights only: use "
                f"{PUBLISHED_FILES}"
            )


def _load(path: Path) -> InceptionV3:
    state = {name: x for name, x in weights.read(path).items() if not name.endswith(".num_batches_tracked")}
    with torch.device("meta"):
        model = InceptionV3()
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    got = {name: tuple(x.shape) for name, x in state.items()}
    wrong = sorted(name for name in {**expected, **got} if expected.get(name) != got.get(name))
    if wrong:
        listed = ", ".join(
            f"{name} (got {got.get(name, 'nothing')}, expected {expected.get(name, 'nothing')})"
            for name in wrong[:_NUM_NAMED]
        )
        raise WeightsError(
            f"{path}: {len(wrong)} tensors differ from those of FID's Inception: {listed}; torchvision's "
            f"inception_v3 is another network, use {PUBLISHED_FILES}"
        )
    model.load_state_dict({name: x.float() for name, x in state.items()}, assign=True)
    return model
