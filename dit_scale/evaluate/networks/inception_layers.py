"""Inception of TensorFlow's `classify_image_graph_def.pb` (2015-12-05): the network of FID, sFID and IS.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567, Table 1, as in
the published graph: 94 convolutions with batch normalization (epsilon 1e-3), 1,008 classes. It differs from
torchvision's Inception: average pools do not count their padding, and the last block takes a maximum instead.
Parameter names are those of the published port to PyTorch.

Shapes: B images, C channels, H W positions, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_CLASSES = 1008
INPUT_SIZE = 299
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7
"""sFID reads the first channels of `mixed_6/conv`, the 1 x 1 branch of Mixed_6d: 17 x 17 x 7 = 2,023."""

_EPSILON = 1e-3
_NO_PADDING = (0, 0)

Size = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A row of the table: a convolution, its normalization and a ReLU."""

    name: str
    channels: int
    kernel: Size = (1, 1)
    stride: int = 1
    is_padded: bool = True
    """Whether the output is as large as the input (at stride 1)."""


@dataclass(frozen=True)
class Branch:
    """A pool, a chain of layers, then layers side by side; each may be absent."""

    chain: tuple[Layer, ...] = ()
    fork: tuple[Layer, ...] = ()
    pool: str = ""


class Norm(nn.Module):
    """Batch normalization with fixed statistics."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalize each channel."""
        return functional.batch_norm(
            x_BCHW, self.running_mean, self.running_var, weight=self.weight, bias=self.bias, eps=_EPSILON
        )


class Convolution(nn.Module):
    """Convolution without bias, normalization, ReLU."""

    def __init__(self, in_channels: int, layer: Layer) -> None:
        super().__init__()
        padding = (layer.kernel[0] // 2, layer.kernel[1] // 2) if layer.is_padded else _NO_PADDING
        self.conv = nn.Conv2d(
            in_channels, layer.channels, layer.kernel, stride=layer.stride, padding=padding, bias=False
        )
        self.bn = Norm(layer.channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Apply the three."""
        return functional.relu(self.bn(self.conv(x_BCHW)))


class Block(nn.Module):
    """Branches over one input, concatenated by channels."""

    def __init__(self, in_channels: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.out_channels = 0
        for branch in branches:
            channels = in_channels
            for layer in branch.chain:
                self.add_module(layer.name, Convolution(channels, layer))
                channels = layer.channels
            for layer in branch.fork:
                self.add_module(layer.name, Convolution(channels, layer))
            self.out_channels += sum(layer.channels for layer in branch.fork) or channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the concatenated outputs."""
        return torch.cat([self._branch(x_BCHW, branch) for branch in self.branches], dim=1)

    def _branch(self, x: Tensor, branch: Branch) -> Tensor:
        if branch.pool:
            x = _POOLS[branch.pool](x)
        for layer in branch.chain:
            x = self.get_submodule(layer.name)(x)
        if branch.fork:
            x = torch.cat([self.get_submodule(layer.name)(x) for layer in branch.fork], dim=1)
        return x


def _average(x_BCHW: Tensor) -> Tensor:
    return functional.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x_BCHW: Tensor) -> Tensor:
    return functional.max_pool2d(x_BCHW, 3, stride=1, padding=1)


def _halve(x_BCHW: Tensor) -> Tensor:
    return functional.max_pool2d(x_BCHW, 3, stride=2)


_POOLS = {"average": _average, "maximum": _maximum, "halve": _halve}


def _block_35(pool_channels: int) -> tuple[Branch, ...]:
    """Return the branches of Mixed_5b to Mixed_5d, at 35 x 35."""
    return (
        Branch((Layer("branch1x1", 64),)),
        Branch((Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5)))),
        Branch(
            (
                Layer("branch3x3dbl_1", 64),
                Layer("branch3x3dbl_2", 96, (3, 3)),
                Layer("branch3x3dbl_3", 96, (3, 3)),
            )
        ),
        Branch((Layer("branch_pool", pool_channels),), pool="average"),
    )


def _to_17() -> tuple[Branch, ...]:
    """Return the branches of Mixed_6a, from 35 x 35 to 17 x 17."""
    return (
        Branch((Layer("branch3x3", 384, (3, 3), stride=2, is_padded=False),)),
        Branch(
            (
                Layer("branch3x3dbl_1", 64),
                Layer("branch3x3dbl_2", 96, (3, 3)),
                Layer("branch3x3dbl_3", 96, (3, 3), stride=2, is_padded=False),
            )
        ),
        Branch(pool="halve"),
    )


def _block_17(inner: int) -> tuple[Branch, ...]:
    """Return the branches of Mixed_6b to Mixed_6e, at 17 x 17."""
    row, column = (1, 7), (7, 1)
    return (
        Branch((Layer("branch1x1", 192),)),
        Branch(
            (
                Layer("branch7x7_1", inner),
                Layer("branch7x7_2", inner, row),
                Layer("branch7x7_3", 192, column),
            )
        ),
        Branch(
            (
                Layer("branch7x7dbl_1", inner),
                Layer("branch7x7dbl_2", inner, column),
                Layer("branch7x7dbl_3", inner, row),
                Layer("branch7x7dbl_4", inner, column),
                Layer("branch7x7dbl_5", 192, row),
            )
        ),
        Branch((Layer("branch_pool", 192),), pool="average"),
    )


def _to_8() -> tuple[Branch, ...]:
    """Return the branches of Mixed_7a, from 17 x 17 to 8 x 8."""
    return (
        Branch((Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), stride=2, is_padded=False))),
        Branch(
            (
                Layer("branch7x7x3_1", 192),
                Layer("branch7x7x3_2", 192, (1, 7)),
                Layer("branch7x7x3_3", 192, (7, 1)),
                Layer("branch7x7x3_4", 192, (3, 3), stride=2, is_padded=False),
            )
        ),
        Branch(pool="halve"),
    )


def _block_8(pool: str) -> tuple[Branch, ...]:
    """Return the branches of Mixed_7b and Mixed_7c, at 8 x 8."""
    row, column = (1, 3), (3, 1)
    return (
        Branch((Layer("branch1x1", 320),)),
        Branch(
            (Layer("branch3x3_1", 384),),
            fork=(Layer("branch3x3_2a", 384, row), Layer("branch3x3_2b", 384, column)),
        ),
        Branch(
            (Layer("branch3x3dbl_1", 448), Layer("branch3x3dbl_2", 384, (3, 3))),
            fork=(Layer("branch3x3dbl_3a", 384, row), Layer("branch3x3dbl_3b", 384, column)),
        ),
        Branch((Layer("branch_pool", 192),), pool=pool),
    )


_STEM = (
    Layer("Conv2d_1a_3x3", 32, (3, 3), stride=2, is_padded=False),
    Layer("Conv2d_2a_3x3", 32, (3, 3), is_padded=False),
    Layer("Conv2d_2b_3x3", 64, (3, 3)),
    Layer("Conv2d_3b_1x1", 80),
    Layer("Conv2d_4a_3x3", 192, (3, 3), is_padded=False),
)
_HALVED_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")

_BLOCKS = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": _to_17(),
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": _to_8(),
    "Mixed_7b": _block_8("average"),
    "Mixed_7c": _block_8("maximum"),
}


class InceptionV3(nn.Module):
    """The network from 299 x 299 pixels in [-1, 1] to pooled features, with the map that sFID reads."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for layer in _STEM:
            self.add_module(layer.name, Convolution(channels, layer))
            channels = layer.channels
        for name, branches in _BLOCKS.items():
            block = Block(channels, branches)
            self.add_module(name, block)
            channels = block.out_channels
        self.fc = nn.Linear(POOL_FEATURES, NUM_CLASSES)

    def forward(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return pool_3 (B, 2048) and the first channels of mixed_6/conv (B, 17, 17, 7)."""
        x = x_B3HW
        for layer in _STEM:
            x = self.get_submodule(layer.name)(x)
            if layer.name in _HALVED_AFTER:
                x = _halve(x)
        for name in _BLOCKS:
            if name == "Mixed_6d":
                branch_BCHW = self.get_submodule("Mixed_6d.branch1x1")(x)
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3)), branch_BCHW[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
