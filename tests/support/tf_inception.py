"""Inception once more, as an independent judge: the operations of TensorFlow's graph in float64.

Images and maps are NHWC. A convolution is a sum of matrix products over the positions of its kernel, padding
is computed by TensorFlow's rule, an average divides by the number of real positions. The table below lists
the operations in the order of the graph; `PORTED` gives the names in the port to PyTorch.

Shapes: N images, H W positions, C channels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
EPSILON = 0.001


@dataclass(frozen=True)
class Op:
    """One operation: `kind` is conv, max, average or join."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    kernel: tuple[int, int] = (3, 3)
    channels: int = 0
    stride: int = 1
    padding: str = "SAME"


def _conv(name: str, source: str, kernel: str, channels: int, valid: int = 0) -> Op:
    """Build a convolution: with a stride `valid` and without padding, or padded to its input's size."""
    height, width = map(int, kernel.split("x"))
    stride, padding = (valid, "VALID") if valid else (1, "SAME")
    shape = (height, width)
    return Op(name, "conv", (source,), kernel=shape, channels=channels, stride=stride, padding=padding)


def _mixed_35(scope: str, source: str, pooled: int) -> Iterator[Op]:
    yield _conv(f"{scope}/conv", source, "1x1", 64)
    yield _conv(f"{scope}/tower/conv", source, "1x1", 48)
    yield _conv(f"{scope}/tower/conv_1", f"{scope}/tower/conv", "5x5", 64)
    yield _conv(f"{scope}/tower_1/conv", source, "1x1", 64)
    yield _conv(f"{scope}/tower_1/conv_1", f"{scope}/tower_1/conv", "3x3", 96)
    yield _conv(f"{scope}/tower_1/conv_2", f"{scope}/tower_1/conv_1", "3x3", 96)
    yield Op(f"{scope}/tower_2/pool", "average", (source,))
    yield _conv(f"{scope}/tower_2/conv", f"{scope}/tower_2/pool", "1x1", pooled)
    ends = ("conv", "tower/conv_1", "tower_1/conv_2", "tower_2/conv")
    yield Op(scope, "join", tuple(f"{scope}/{end}" for end in ends))


def _mixed_17(scope: str, source: str, inner: int) -> Iterator[Op]:
    yield _conv(f"{scope}/conv", source, "1x1", 192)
    yield _conv(f"{scope}/tower/conv", source, "1x1", inner)
    yield _conv(f"{scope}/tower/conv_1", f"{scope}/tower/conv", "1x7", inner)
    yield _conv(f"{scope}/tower/conv_2", f"{scope}/tower/conv_1", "7x1", 192)
    yield _conv(f"{scope}/tower_1/conv", source, "1x1", inner)
    yield _conv(f"{scope}/tower_1/conv_1", f"{scope}/tower_1/conv", "7x1", inner)
    yield _conv(f"{scope}/tower_1/conv_2", f"{scope}/tower_1/conv_1", "1x7", inner)
    yield _conv(f"{scope}/tower_1/conv_3", f"{scope}/tower_1/conv_2", "7x1", inner)
    yield _conv(f"{scope}/tower_1/conv_4", f"{scope}/tower_1/conv_3", "1x7", 192)
    yield Op(f"{scope}/tower_2/pool", "average", (source,))
    yield _conv(f"{scope}/tower_2/conv", f"{scope}/tower_2/pool", "1x1", 192)
    ends = ("conv", "tower/conv_2", "tower_1/conv_4", "tower_2/conv")
    yield Op(scope, "join", tuple(f"{scope}/{end}" for end in ends))


def _mixed_8(scope: str, source: str, pool: str) -> Iterator[Op]:
    yield _conv(f"{scope}/conv", source, "1x1", 320)
    yield _conv(f"{scope}/tower/conv", source, "1x1", 384)
    yield _conv(f"{scope}/tower/mixed/conv", f"{scope}/tower/conv", "1x3", 384)
    yield _conv(f"{scope}/tower/mixed/conv_1", f"{scope}/tower/conv", "3x1", 384)
    yield _conv(f"{scope}/tower_1/conv", source, "1x1", 448)
    yield _conv(f"{scope}/tower_1/conv_1", f"{scope}/tower_1/conv", "3x3", 384)
    yield _conv(f"{scope}/tower_1/mixed/conv", f"{scope}/tower_1/conv_1", "1x3", 384)
    yield _conv(f"{scope}/tower_1/mixed/conv_1", f"{scope}/tower_1/conv_1", "3x1", 384)
    yield Op(f"{scope}/tower_2/pool", pool, (source,))
    yield _conv(f"{scope}/tower_2/conv", f"{scope}/tower_2/pool", "1x1", 192)
    ends = ("conv", "tower/mixed/conv", "tower/mixed/conv_1", "tower_1/mixed/conv", "tower_1/mixed/conv_1")
    yield Op(scope, "join", tuple(f"{scope}/{end}" for end in (*ends, "tower_2/conv")))


def _graph() -> Iterator[Op]:
    yield _conv("conv", "pixels", "3x3", 32, valid=2)
    yield _conv("conv_1", "conv", "3x3", 32, valid=1)
    yield _conv("conv_2", "conv_1", "3x3", 64)
    yield Op("pool", "max", ("conv_2",), stride=2, padding="VALID")
    yield _conv("conv_3", "pool", "1x1", 80)
    yield _conv("conv_4", "conv_3", "3x3", 192, valid=1)
    yield Op("pool_1", "max", ("conv_4",), stride=2, padding="VALID")
    yield from _mixed_35("mixed", "pool_1", 32)
    yield from _mixed_35("mixed_1", "mixed", 64)
    yield from _mixed_35("mixed_2", "mixed_1", 64)
    yield _conv("mixed_3/conv", "mixed_2", "3x3", 384, valid=2)
    yield _conv("mixed_3/tower/conv", "mixed_2", "1x1", 64)
    yield _conv("mixed_3/tower/conv_1", "mixed_3/tower/conv", "3x3", 96)
    yield _conv("mixed_3/tower/conv_2", "mixed_3/tower/conv_1", "3x3", 96, valid=2)
    yield Op("mixed_3/pool", "max", ("mixed_2",), stride=2, padding="VALID")
    yield Op("mixed_3", "join", ("mixed_3/conv", "mixed_3/tower/conv_2", "mixed_3/pool"))
    yield from _mixed_17("mixed_4", "mixed_3", 128)
    yield from _mixed_17("mixed_5", "mixed_4", 160)
    yield from _mixed_17("mixed_6", "mixed_5", 160)
    yield from _mixed_17("mixed_7", "mixed_6", 192)
    yield _conv("mixed_8/tower/conv", "mixed_7", "1x1", 192)
    yield _conv("mixed_8/tower/conv_1", "mixed_8/tower/conv", "3x3", 320, valid=2)
    yield _conv("mixed_8/tower_1/conv", "mixed_7", "1x1", 192)
    yield _conv("mixed_8/tower_1/conv_1", "mixed_8/tower_1/conv", "1x7", 192)
    yield _conv("mixed_8/tower_1/conv_2", "mixed_8/tower_1/conv_1", "7x1", 192)
    yield _conv("mixed_8/tower_1/conv_3", "mixed_8/tower_1/conv_2", "3x3", 192, valid=2)
    yield Op("mixed_8/pool", "max", ("mixed_7",), stride=2, padding="VALID")
    yield Op("mixed_8", "join", ("mixed_8/tower/conv_1", "mixed_8/tower_1/conv_3", "mixed_8/pool"))
    yield from _mixed_8("mixed_9", "mixed_8", "average")
    yield from _mixed_8("mixed_10", "mixed_9", "max")


GRAPH = tuple(_graph())
NUM_CLASSES, POOLED = 1008, 2048

_SCOPES = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
    "mixed": "Mixed_5b",
    "mixed_1": "Mixed_5c",
    "mixed_2": "Mixed_5d",
    "mixed_3": "Mixed_6a",
    "mixed_4": "Mixed_6b",
    "mixed_5": "Mixed_6c",
    "mixed_6": "Mixed_6d",
    "mixed_7": "Mixed_6e",
    "mixed_8": "Mixed_7a",
    "mixed_9": "Mixed_7b",
    "mixed_10": "Mixed_7c",
}
_TOWERS = {
    "Mixed_5": ("branch1x1", "branch5x5_{}", "branch3x3dbl_{}"),
    "Mixed_6a": ("branch3x3", "branch3x3dbl_{}", ""),
    "Mixed_6": ("branch1x1", "branch7x7_{}", "branch7x7dbl_{}"),
    "Mixed_7a": ("", "branch3x3_{}", "branch7x7x3_{}"),
    "Mixed_7": ("branch1x1", "branch3x3_{}", "branch3x3dbl_{}"),
}


def ported_name(name: str) -> str:
    """Return a convolution's name in the port: mixed_6/tower_1/conv_2 is Mixed_6d.branch7x7dbl_3."""
    scope, _, rest = name.partition("/")
    block = _SCOPES[scope]
    if not rest:
        return block
    single, first, second = next(names for key, names in _TOWERS.items() if block.startswith(key))
    tower, _, conv = rest.partition("/")
    if tower == "tower_2":
        return f"{block}.branch_pool"
    if not conv:
        return f"{block}.{single}"
    pattern = first if tower == "tower" else second
    side_by_side = conv.startswith("mixed/")
    number = int(conv.rpartition("_")[2]) if conv[-1].isdigit() else 0
    if side_by_side:  # numbered after the chain before them: 2a and 2b, or 3a and 3b
        return f"{block}." + pattern.format(("2" if tower == "tower" else "3") + "ab"[number])
    return f"{block}." + pattern.format(number + 1)


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Return name and shape of each tensor of the port, from the table."""
    channels = {"pixels": 3}
    shapes: dict[str, tuple[int, ...]] = {}
    for op in GRAPH:
        inputs = [channels[name] for name in op.inputs]
        channels[op.name] = op.channels or sum(inputs)
        if op.kind == "conv":
            ported = ported_name(op.name)
            shapes[f"{ported}.conv.weight"] = (op.channels, inputs[0], *op.kernel)
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{ported}.bn.{tensor}"] = (op.channels,)
    return {**shapes, "fc.weight": (NUM_CLASSES, POOLED), "fc.bias": (NUM_CLASSES,)}


def random_weights(seed: int) -> dict[str, Array]:
    """Draw fp32 weights that keep activations near one, with statistics far from neutral."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_shapes().items():
        if len(shape) > 1:
            drawn = random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        elif name.endswith(("running_var", "bn.weight")):
            drawn = random.uniform(0.5, 1.5, shape)
        else:
            drawn = random.normal(0, 0.3, shape)
        weights[name] = drawn.astype(np.float32)
    return weights


def run(weights: Mapping[str, Array], pixels_NHWC: Array) -> dict[str, Array]:
    """Compute every operation of the graph on images in [-1, 1] => maps by name, and pool_3 (N, 2048)."""
    maps = {"pixels": pixels_NHWC.astype(np.float64)}
    for op in GRAPH:
        inputs = [maps[name] for name in op.inputs]
        if op.kind == "conv":
            prefix = ported_name(op.name)
            tensors = {name: weights[f"{prefix}.{name}"].astype(np.float64) for name in _TENSORS}
            maps[op.name] = _convolve(inputs[0], op, tensors)
        elif op.kind == "join":
            maps[op.name] = np.concatenate(inputs, axis=3)
        else:
            maps[op.name] = _pool(inputs[0], op)
    maps["pool_3"] = maps["mixed_10"].mean(axis=(1, 2))
    return maps


_TENSORS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def _windows(x_NHWC: Array, op: Op, fill: float) -> Iterator[tuple[int, int, Array]]:
    """Yield each position of the kernel and the pixels under it, one per output position."""
    if op.padding == "SAME":
        assert op.stride == 1
        pads = [((size - 1) // 2, size // 2) for size in op.kernel]
        x_NHWC = np.pad(x_NHWC, ((0, 0), *pads, (0, 0)), constant_values=fill)
    height, width = ((x_NHWC.shape[i + 1] - op.kernel[i]) // op.stride + 1 for i in (0, 1))
    for row in range(op.kernel[0]):
        for column in range(op.kernel[1]):
            rows = slice(row, row + (height - 1) * op.stride + 1, op.stride)
            columns = slice(column, column + (width - 1) * op.stride + 1, op.stride)
            yield row, column, x_NHWC[:, rows, columns]


def _convolve(x_NHWC: Array, op: Op, tensors: Mapping[str, Array]) -> Array:
    kernel_HWIO = tensors["conv.weight"].transpose(2, 3, 1, 0)
    out = sum(window @ kernel_HWIO[row, column] for row, column, window in _windows(x_NHWC, op, 0.0))
    scale = tensors["bn.weight"] / np.sqrt(tensors["bn.running_var"] + EPSILON)
    return np.maximum((out - tensors["bn.running_mean"]) * scale + tensors["bn.bias"], 0.0)


def _pool(x_NHWC: Array, op: Op) -> Array:
    if op.kind == "max":
        return np.max([window for _, _, window in _windows(x_NHWC, op, -np.inf)], axis=0)
    total = sum(window for _, _, window in _windows(x_NHWC, op, 0.0))
    return total / sum(window for _, _, window in _windows(np.ones_like(x_NHWC), op, 0.0))
